/* LD_PRELOAD: calls on paths that hold a word fail as those of a file server that went away. The file $FILE_SERVER says
   which error and which word ("107 /run.json"); where it is not there, the server is back. */
#define _GNU_SOURCE
#include <dlfcn.h>
#include <dirent.h>
#include <errno.h>
#include <fcntl.h>
#include <stdarg.h>
#include <stdio.h>
#include <stdlib.h>
#include <string.h>
#include <sys/stat.h>

#define REAL(name) ((__typeof__(&name))dlsym(RTLD_NEXT, #name))

static int away(const char *path) {
  const char *control = getenv("FILE_SERVER");
  char word[256];
  int number = 0;
  FILE *file = control && path ? REAL(fopen)(control, "r") : NULL;
  if (!file) return 0;
  if (fscanf(file, "%d %255s", &number, word) != 2 || !strstr(path, word)) number = 0;
  fclose(file);
  if (number) errno = number;
  return number;
}

#define OPEN(name)                                  \
  int name(const char *path, int flags, ...) {      \
    va_list rest;                                   \
    va_start(rest, flags);                          \
    mode_t mode = va_arg(rest, mode_t);             \
    va_end(rest);                                   \
    return away(path) ? -1 : REAL(name)(path, flags, mode); \
  }
OPEN(open)
OPEN(open64)

int mkdir(const char *path, mode_t mode) { return away(path) ? -1 : REAL(mkdir)(path, mode); }
int rename(const char *from, const char *to) { return away(to) ? -1 : REAL(rename)(from, to); }
int stat(const char *path, struct stat *found) { return away(path) ? -1 : REAL(stat)(path, found); }
DIR *opendir(const char *path) { return away(path) ? NULL : REAL(opendir)(path); }
