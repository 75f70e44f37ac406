// Entry command of the guests' image: runs each of the programs named, one after the other, and says how they ended.
#include <stdio.h>
#include <sys/wait.h>
#include <unistd.h>

int main(int argc, char **argv) {
    int failures = 0;
    setvbuf(stdout, NULL, _IOLBF, 0);
    for (int i = 1; i < argc; i++) {
        char path[256];
        snprintf(path, sizeof path, "/guests/%s", argv[i]);
        printf("== %s\n", argv[i]);
        fflush(stdout);
        pid_t child = fork();
        if (child == 0) {
            execl(path, argv[i], (char *)NULL);
            perror(path);
            _exit(127);
        }
        int status = 0;
        if (child < 0 || waitpid(child, &status, 0) != child) {
            perror("fork");
            return 126;
        }
        if (WIFSIGNALED(status)) {
            printf("== %s signal %d\n", argv[i], WTERMSIG(status));
        } else {
            printf("== %s exit %d\n", argv[i], WEXITSTATUS(status));
        }
        failures += status != 0;
    }
    return failures;
}
