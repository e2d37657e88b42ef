/* The least that a FUSE file can cost: one file of 64 bytes, in C over libfuse's low-level interface, one thread.
 *
 *     hello_ll MOUNTPOINT     serves the file "least" until it is unmounted; prints "ready" when mounted
 */
#define FUSE_USE_VERSION 31
#include <errno.h>
#include <fuse_lowlevel.h>
#include <stdio.h>
#include <string.h>
#include <sys/stat.h>
#include <unistd.h>

static const char content[64] = "what a register or an exit takes";

static void describe(fuse_ino_t inode, struct stat *status)
{
    *status = (struct stat){.st_ino = inode, .st_uid = getuid(), .st_gid = getgid(), .st_nlink = 1};
    status->st_mode = inode == FUSE_ROOT_ID ? S_IFDIR | 0755 : S_IFREG | 0644;
    status->st_size = inode == FUSE_ROOT_ID ? 0 : (off_t)sizeof content;
}
static void get_attributes(fuse_req_t request, fuse_ino_t inode, struct fuse_file_info *info)
{
    struct stat status;
    (void)info;
    describe(inode, &status);
    fuse_reply_attr(request, &status, 1.0);
}
static void lookup(fuse_req_t request, fuse_ino_t parent, const char *name)
{
    struct fuse_entry_param entry = {.ino = 2, .attr_timeout = 1.0, .entry_timeout = 1.0};
    (void)parent;
    if (strcmp(name, "least")) {
        fuse_reply_err(request, ENOENT);
        return;
    }
    describe(entry.ino, &entry.attr);
    fuse_reply_entry(request, &entry);
}
static void open_file(fuse_req_t request, fuse_ino_t inode, struct fuse_file_info *info)
{
    (void)inode;
    info->direct_io = 1;
    fuse_reply_open(request, info);
}
static void read_file(fuse_req_t request, fuse_ino_t inode, size_t size, off_t offset, struct fuse_file_info *info)
{
    (void)inode, (void)info;
    size_t from = offset < (off_t)sizeof content ? (size_t)offset : sizeof content;
    size_t left = sizeof content - from;
    fuse_reply_buf(request, content + from, left < size ? left : size);
}

int main(int argc, char **argv)
{
    static const struct fuse_lowlevel_ops operations = {
        .lookup = lookup, .getattr = get_attributes, .open = open_file, .read = read_file,
    };
    struct fuse_args none = FUSE_ARGS_INIT(1, argv);
    struct fuse_session *session = argc == 2 ? fuse_session_new(&none, &operations, sizeof operations, NULL) : NULL;
    if (!session || fuse_session_mount(session, argv[1]))
        return 1;
    puts("ready");
    fflush(stdout);
    fuse_session_loop(session);
    fuse_session_unmount(session);
    fuse_session_destroy(session);
    return 0;
}
