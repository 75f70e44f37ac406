import java.lang.ref.WeakReference;
import java.util.ArrayList;
import java.util.HashMap;
import java.util.List;
import java.util.Map;
import java.util.UUID;
import java.util.concurrent.ThreadLocalRandom;

/**
 * Everything in a Java program that may differ from one run to the next: identity hash codes and what is ordered by
 * them, thread interleavings, data races, random numbers, the clock, and the garbage collector's timing.
 */
public final class Demo {
    private static volatile int shared;

    private Demo() {
    }

    public static void main(String[] arguments) throws Exception {
        long start = System.nanoTime();
        System.out.println("java: " + System.getProperty("java.vm.name") + " " + System.getProperty("java.version"));
        System.out.println("processors: " + Runtime.getRuntime().availableProcessors());
        System.out.println("time: " + java.time.Instant.now());
        System.out.println("identity hash codes: " + identityHashCodes());
        System.out.println("identity map order: " + identityMapOrder());
        System.out.println("thread local random: " + ThreadLocalRandom.current().nextLong());
        System.out.println("uuid: " + UUID.randomUUID());
        System.out.println("thread log: " + threadLog(4, 16));
        for (int round = 0; round < 2; round++) {
            int expected = 4 * 200_000;
            int got = lostUpdates(4, 200_000);
            System.out.println("racing counter: " + got + " of " + expected + ", " + (expected - got) + " lost");
        }
        System.out.println("garbage: " + collectGarbage());
        System.out.println("elapsed ns: " + (System.nanoTime() - start));
    }

    /**
     * Hash codes of objects without one of their own: random numbers that the VM draws, from a generator per thread.
     * The main thread's always starts alike; that of a thread born in the fray depends on how many came before it.
     */
    private static String identityHashCodes() {
        StringBuilder codes = new StringBuilder();
        for (int i = 0; i < 6; i++) {
            codes.append(Integer.toHexString(System.identityHashCode(new Object()))).append(' ');
        }
        return codes.toString().trim();
    }

    /** A HashMap whose keys have no hash code of their own iterates in a different order each run. */
    private static String identityMapOrder() {
        final class Key {
        }
        Map<Key, Character> map = new HashMap<>();
        for (char name = 'a'; name <= 'p'; name++) {
            map.put(new Key(), name);
        }
        StringBuilder order = new StringBuilder();
        map.values().forEach(order::append);
        return order.toString();
    }

    /** The order in which threads reach a shared log, each computing between its entries. */
    private static String threadLog(int threads, int steps) throws InterruptedException {
        StringBuffer log = new StringBuffer();
        run(threads, name -> {
            long sum = name;
            for (int step = 0; step < steps; step++) {
                for (int i = 0; i < 100_000; i++) {
                    sum = sum * 6364136223846793005L + 1442695040888963407L;
                }
                log.append((char) ('A' + name));
                if (sum % 7 == 0) {
                    Thread.yield();
                }
            }
        });
        return log.toString();
    }

    /**
     * A counter that several threads increment without synchronisation: whoever is interrupted between reading and
     * writing writes back an old value, and the updates that others made are lost.
     */
    private static int lostUpdates(int threads, int increments) throws InterruptedException {
        shared = 0;
        run(threads, name -> {
            for (int i = 0; i < increments; i++) {
                int value = shared;
                for (int dawdle = 0; dawdle < 20; dawdle++) {
                    value += dawdle & 1;
                }
                shared = value - 9;
            }
        });
        return shared;
    }

    /** How many weakly held objects survive a burst of allocation: when the collector ran decides. */
    private static String collectGarbage() {
        List<WeakReference<byte[]>> references = new ArrayList<>();
        long bytes = 0;
        for (int i = 0; i < 3000; i++) {
            byte[] block = new byte[16 << 10];
            bytes += block.length;
            references.add(new WeakReference<>(block));
        }
        long alive = references.stream().filter(reference -> reference.get() != null).count();
        return alive + " of " + references.size() + " blocks alive after " + (bytes >> 20) + " MiB";
    }

    private interface Work {
        void accept(int name);
    }

    private static void run(int threads, Work work) throws InterruptedException {
        List<Thread> all = new ArrayList<>();
        for (int i = 0; i < threads; i++) {
            int name = i;
            Thread thread = new Thread(() -> work.accept(name));
            all.add(thread);
            thread.start();
        }
        for (Thread thread : all) {
            thread.join();
        }
    }
}
