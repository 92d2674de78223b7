/* A machine whose clock is CLOCK_AHEAD_S seconds ahead of that of its file system, for LD_PRELOAD. */
#define _GNU_SOURCE
#include <dlfcn.h>
#include <stdlib.h>
#include <time.h>

int clock_gettime(clockid_t clock, struct timespec *now) {
    static int (*real)(clockid_t, struct timespec *);
    if (!real) real = (int (*)(clockid_t, struct timespec *))dlsym(RTLD_NEXT, "clock_gettime");
    int code = real(clock, now);
    const char *ahead = getenv("CLOCK_AHEAD_S");
    if (code == 0 && clock == CLOCK_REALTIME && ahead) now->tv_sec += atol(ahead);
    return code;
}
