import java.util.ArrayList;
import java.util.HashMap;
import java.util.List;
import java.util.Map;
import java.util.function.LongSupplier;
import java.util.stream.Stream;

/**
 * The JVM half of the benchmark.
 *
 * <p>It runs lines of work one after the other and says on standard output when each begins and ends ("@@ begin
 * NAME", "@@ end NAME RESULT"), before "@@ done". It measures nothing itself: a guest's clock shows
 * virtual time, so whoever reads the markers keeps the time. A line's time includes its warm-up, from interpreted to
 * compiled code, as a program's time does; with "-steady" behind its name, the work is done a few times before the line
 * begins, and then a few times more. Results depend on the work alone and must be equal everywhere.
 *
 * <p>Arguments are the names of the lines to run; without any, all are, and "nothing" runs none. The launcher has
 * begun the line jvm-start, and main ends it.
 */
public final class Bench {
    /** A piece of work with a checkable result. */
    private record Line(String name, LongSupplier work) {
        /** The same when it has been compiled. */
        Line steady() {
            return new Line(name + STEADY, () -> {
                long result = 0;
                for (int turn = 0; turn < STEADY_TURNS; turn++) {
                    result = mix(result, work.getAsLong());
                }
                return result;
            });
        }
    }

    private static final String STEADY = "-steady";
    /** How often a steady line's work is done, and before it begins, too. */
    private static final int STEADY_TURNS = 3;

    private static final List<Line> LINES = List.of(
        new Line("jvm-fib", () -> fib(41)),
        new Line("jvm-hashmap", Bench::hashMap),
        new Line("jvm-stringbuilder", Bench::stringBuilder),
        new Line("jvm-doubles", Bench::doubles),
        new Line("jvm-allocation", Bench::allocation),
        new Line("jvm-locks", Bench::locks));

    private Bench() {}

    public static void main(String[] names) {
        System.out.println("@@ end jvm-start " + Integer.toHexString(Runtime.version().feature()));
        System.out.flush();
        for (Line line : choose(names)) {
            if (line.name().endsWith(STEADY)) {
                line.work().getAsLong();
            }
            // No line pays for the garbage of the one before.
            System.gc();
            System.out.println("@@ begin " + line.name());
            System.out.flush();
            long result = line.work().getAsLong();
            System.out.println("@@ end " + line.name() + " " + String.format("%016x", result));
            System.out.flush();
        }
        System.out.println("@@ done");
    }

    private static List<Line> choose(String[] names) {
        if (names.length == 0) {
            return LINES;
        }
        List<Line> chosen = new ArrayList<>();
        for (String name : names) {
            if (name.equals("nothing")) {
                continue;
            }
            Line found = LINES.stream()
                .flatMap(line -> Stream.of(line, line.steady()))
                .filter(line -> line.name().equals(name))
                .findFirst()
                .orElse(null);
            if (found == null) {
                System.err.println("Bench: there is no line " + name);
                System.exit(2);
            }
            chosen.add(found);
        }
        return chosen;
    }

    /** xorshift64*: the same numbers everywhere. */
    private static final class Generator {
        private long state;

        Generator(long seed) {
            state = seed;
        }

        long next() {
            state ^= state >>> 12;
            state ^= state << 25;
            state ^= state >>> 27;
            return state * 0x2545f4914f6cdd1dL;
        }

        int below(int bound) {
            return (int) Long.remainderUnsigned(next(), bound);
        }
    }

    private static long mix(long result, long value) {
        return (result ^ value) * 0x100000001b3L;
    }

    /** Calls, returns and small integer arithmetic. */
    private static long fib(long n) {
        return n < 2 ? n : fib(n - 1) + fib(n - 2);
    }

    /** Boxed and text keys in hash tables: virtual calls and pointers to follow. */
    private static long hashMap() {
        Generator pick = new Generator(23);
        Map<Long, Long> counts = new HashMap<>();
        for (long i = 0; i < 1_200_000; i++) {
            counts.merge((long) pick.below(200_000), i, Long::sum);
            if (i % 5 == 0) {
                counts.remove((long) pick.below(200_000));
            }
        }
        Map<String, Integer> words = new HashMap<>();
        for (int i = 0; i < 800_000; i++) {
            words.merge("key-" + pick.below(50_000), 1, Integer::sum);
        }
        long sum = 0;
        for (Map.Entry<Long, Long> entry : counts.entrySet()) {
            sum += mix(entry.getKey(), entry.getValue());
        }
        for (Map.Entry<String, Integer> entry : words.entrySet()) {
            sum += mix(entry.getKey().hashCode(), entry.getValue());
        }
        return sum;
    }

    /** Text put together and taken apart: copies, number formatting, intrinsics for strings. */
    private static long stringBuilder() {
        Generator pick = new Generator(29);
        long result = 0;
        for (int round = 0; round < 60; round++) {
            StringBuilder text = new StringBuilder();
            for (int i = 0; i < 20_000; i++) {
                text.append("line ").append(i).append(": ").append(pick.next());
                text.append(' ').append((char) ('a' + i % 26));
                text.append(i % 3 == 0).append('\n');
            }
            String whole = text.toString();
            result = mix(result, whole.hashCode());
            int at = 0;
            int found = 0;
            while ((at = whole.indexOf("99", at)) >= 0) {
                found++;
                at++;
            }
            result = mix(result, found + text.reverse().indexOf("true"));
        }
        return result;
    }

    /** Floating point over arrays: loops that the compiler turns into vector instructions, and some it cannot. */
    private static long doubles() {
        Generator pick = new Generator(31);
        int length = 4096;
        double[] a = new double[length];
        double[] b = new double[length];
        double[] c = new double[length];
        for (int i = 0; i < length; i++) {
            a[i] = pick.below(1 << 20) / 1048576.0;
            b[i] = pick.below(1 << 20) / 1048576.0 + 0.5;
        }
        double checked = 0;
        for (int round = 0; round < 100_000; round++) {
            double factor = 1.0 / (1 + round % 16);
            for (int i = 0; i < length; i++) {
                c[i] = a[i] * factor + b[i];
            }
            if (round % 16 == 0) {
                double sum = 0;
                for (int i = 0; i < length; i++) {
                    sum += Math.sqrt(c[i]) / b[i];
                }
                checked += sum;
            }
        }
        return Double.doubleToLongBits(checked);
    }

    /** A node of a binary tree. */
    private static final class Node {
        final Node left;
        final Node right;
        final long value;

        Node(Node left, Node right, long value) {
            this.left = left;
            this.right = right;
            this.value = value;
        }

        static Node grow(int depth, long value) {
            return depth == 0
                ? new Node(null, null, value)
                : new Node(grow(depth - 1, 2 * value), grow(depth - 1, 2 * value + 1), value);
        }

        long sum() {
            return value + (left == null ? 0 : left.sum() + right.sum());
        }
    }

    /** Trees that live for a short, a medium and a long time: allocation and both generations of the collector. */
    private static long allocation() {
        Node old = Node.grow(18, 1);
        Node[] recent = new Node[16];
        long sum = 0;
        for (int round = 0; round < 8_000; round++) {
            Node young = Node.grow(11, round);
            sum += young.sum();
            if (round % 8 == 0) {
                recent[round / 8 % recent.length] = young;
            }
        }
        for (Node node : recent) {
            sum += node.sum();
        }
        return mix(sum, old.sum());
    }

    private static final Object LOCK = new Object();
    private static long shared;
    private static boolean turn;

    /** Threads that want one monitor: contention, parking, and a hand-over with wait and notify. */
    private static long locks() {
        shared = 0;
        List<Thread> threads = new ArrayList<>();
        for (int t = 0; t < 4; t++) {
            threads.add(new Thread(() -> {
                for (int i = 0; i < 3_000_000; i++) {
                    synchronized (LOCK) {
                        shared += i & 3;
                    }
                }
            }));
        }
        for (boolean mine : new boolean[] {false, true}) {
            threads.add(new Thread(() -> handOver(mine)));
        }
        threads.forEach(Thread::start);
        for (Thread thread : threads) {
            try {
                thread.join();
            } catch (InterruptedException impossible) {
                throw new IllegalStateException(impossible);
            }
        }
        return shared;
    }

    private static void handOver(boolean mine) {
        Object door = Bench.class;
        for (int i = 0; i < 25_000; i++) {
            synchronized (door) {
                while (turn != mine) {
                    try {
                        door.wait();
                    } catch (InterruptedException impossible) {
                        throw new IllegalStateException(impossible);
                    }
                }
                turn = !mine;
                door.notifyAll();
            }
        }
    }
}
