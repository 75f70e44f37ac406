// Says that the JVM starts, and becomes the JVM: `launch JAVA ARGUMENTS...`. The program says when main begins.
#include <stdio.h>
#include <unistd.h>

int main(int argc, char **argv)
{
    if (argc < 2) {
        fprintf(stderr, "usage: launch PROGRAM [ARGUMENTS...]\n");
        return 2;
    }
    printf("@@ start\n@@ begin jvm-start\n");
    fflush(stdout);
    execv(argv[1], argv + 1);
    perror(argv[1]);
    return 1;
}
