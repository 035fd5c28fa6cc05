/* Calls to rename enter; of a folder beneath $NO_FOLDER_RENAMES they leave with ENOSYS, as gcsfuse answers, and are
   written to $NO_FOLDER_RENAMES_LOG. Loaded by LD_PRELOAD, so that Python and C++ meet it alike. */
#define _GNU_SOURCE
#include <dlfcn.h>
#include <errno.h>
#include <fcntl.h>
#include <limits.h>
#include <stdio.h>
#include <stdlib.h>
#include <string.h>
#include <sys/stat.h>

static int refused(int folder, const char *from) {
    const char *root = getenv("NO_FOLDER_RENAMES"), *log = getenv("NO_FOLDER_RENAMES_LOG");
    struct stat found;
    char whole[PATH_MAX];
    if (!root || fstatat(folder, from, &found, AT_SYMLINK_NOFOLLOW) || !S_ISDIR(found.st_mode)) return 0;
    if (!realpath(from, whole) || strncmp(whole, root, strlen(root))) return 0;
    FILE *file = log ? fopen(log, "a") : NULL;
    if (file) {
        fprintf(file, "%s\n", whole);
        fclose(file);
    }
    errno = ENOSYS;
    return 1;
}

int rename(const char *from, const char *to) {
    static int (*real)(const char *, const char *);
    if (!real) real = dlsym(RTLD_NEXT, "rename");
    return refused(AT_FDCWD, from) ? -1 : real(from, to);
}

int renameat(int from_folder, const char *from, int to_folder, const char *to) {
    static int (*real)(int, const char *, int, const char *);
    if (!real) real = dlsym(RTLD_NEXT, "renameat");
    return refused(from_folder, from) ? -1 : real(from_folder, from, to_folder, to);
}

int renameat2(int from_folder, const char *from, int to_folder, const char *to, unsigned int flags) {
    static int (*real)(int, const char *, int, const char *, unsigned int);
    if (!real) real = dlsym(RTLD_NEXT, "renameat2");
    return refused(from_folder, from) ? -1 : real(from_folder, from, to_folder, to, flags);
}
