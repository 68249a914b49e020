# SPDX-License-Identifier: MIT
"""Builds hwerr_notify._libbpf, the few functions of libbpf that the package calls.

Optional: where libbpf-dev is missing, the package is built without it. Run by
setuptools, not imported at run time.
"""

from __future__ import annotations

import re
from pathlib import Path

import cffi

HERE = Path(__file__).resolve().parent
SOURCE = HERE / "_libbpf.c"
SHARED = HERE.parent / "bpf"

CDEF = """
#define BPF_ANY ...
#define BPF_NOEXIST ...
#define BPF_EXIST ...
#define HWERR_SEALS_MAX ...
#define HWERR_KEPT_OUT_MAX ...

struct bpf_object;
struct bpf_program;
struct bpf_map;
struct bpf_link;
struct ring_buffer;
struct hwerr_seal {
    unsigned long long start_ns;
    unsigned long long refusals;
};
struct hwerr_kept_out {
    unsigned int tgid;
    unsigned int dev;
    unsigned long long ino;
};

struct bpf_object *bpf_object__open_file(const char *path, const void *opts);
int bpf_object__load(struct bpf_object *obj);
void bpf_object__close(struct bpf_object *obj);
struct bpf_program *bpf_object__next_program(const struct bpf_object *obj, struct bpf_program *prog);
struct bpf_map *bpf_object__find_map_by_name(const struct bpf_object *obj, const char *name);
const char *bpf_program__name(const struct bpf_program *prog);
int bpf_program__fd(const struct bpf_program *prog);
int bpf_program__set_autoload(struct bpf_program *prog, bool autoload);
struct bpf_link *bpf_program__attach(const struct bpf_program *prog);
int bpf_map__fd(const struct bpf_map *map);
int bpf_map__reuse_fd(struct bpf_map *map, int fd);
int bpf_map__set_initial_value(struct bpf_map *map, const void *data, size_t size);
int bpf_link__fd(const struct bpf_link *link);
int bpf_link__destroy(struct bpf_link *link);
int bpf_obj_pin(int fd, const char *path);
int bpf_obj_get(const char *path);
int bpf_map_lookup_elem(int fd, const void *key, void *value);
int bpf_map_update_elem(int fd, const void *key, const void *value, uint64_t flags);
int bpf_map_delete_elem(int fd, const void *key);
int bpf_map_get_next_key(int fd, const void *key, void *next);

struct ring_buffer *hwerr_ring_new(int map_fd, void *ctx);
void ring_buffer__free(struct ring_buffer *rb);
int ring_buffer__consume(struct ring_buffer *rb);
int ring_buffer__epoll_fd(const struct ring_buffer *rb);

void hwerr_libbpf_quiet(void);
const char *hwerr_libbpf_said(void);
bool hwerr_is_bpf_fs(const char *path);
int hwerr_map_shape(int fd, uint32_t *shape);
int64_t hwerr_program_misses(int fd);
int hwerr_link_program(const char *path);
int hwerr_timer_new(void);
int hwerr_timer_set(int fd, uint64_t ns);
extern "Python" int hwerr_ring_sample(void *ctx, void *data, size_t size);
"""


def declarations(header: str) -> str:
    """The cdef of a header without conditions: its types, and the names of its macros."""
    text = re.sub(r"/\*.*?\*/", "", header, flags=re.DOTALL)
    macros = re.findall(r"^#define (\w+)[ \t]+\S", text, re.MULTILINE)
    sizes = dict(re.findall(r"^#define (\w+)[ \t]+(\d+)\s*$", text, re.MULTILINE))
    types = re.sub(r"^#.*$", "", text, flags=re.MULTILINE)
    types = re.sub(r"\[(\w+)\]", lambda m: f"[{sizes.get(m[1], m[1])}]", types)
    types = re.sub(r"\b__([us])(8|16|32|64)\b", lambda m: f"{'u' * (m[1] == 'u')}int{m[2]}_t", types)
    return types + "".join(f"#define {name} ...\n" for name in macros)


def make() -> cffi.FFI:
    """The builder that setup.py names."""
    ffi = cffi.FFI()
    ffi.cdef(CDEF)
    for name in ("probe.h", "hardware.h"):
        ffi.cdef(declarations((SHARED / name).read_text(encoding="ascii")))
    ffi.set_source(
        "hwerr_notify._libbpf",
        SOURCE.read_text(encoding="ascii"),
        include_dirs=[str(SHARED)],
        depends=[str(SOURCE), str(SHARED / "seal.h"), str(SHARED / "probe.h"), str(SHARED / "hardware.h")],
        libraries=["bpf"],
        optional=True,
    )
    return ffi


ffibuilder = make()

if __name__ == "__main__":
    ffibuilder.compile(verbose=True)
