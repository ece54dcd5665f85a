# Lists tar archives with Python's tarfile and with libarchive, for tests/differential.rs.
#
# Standard input: archives, each as its length (8 bytes, big endian) and its bytes. Standard output:
# for each a line of JSON, {"tarfile": LISTING, "libarchive": LISTING}, where LISTING is a list of
# entries, or a text that says why there is none.
import ctypes, ctypes.util, hashlib, io, json, math, sys, tarfile

SMALL = 1 << 20  # Content of larger files is not compared.


def digest(content):
    return hashlib.sha256(content).hexdigest()


def with_tarfile(data):
    entries = []
    archive = tarfile.open(
        fileobj=io.BytesIO(data), mode="r:", encoding="utf-8", errors="surrogateescape"
    )
    for m in iter(archive.next, None):
        if len(entries) > len(data) // 512:
            return "it goes round in circles"
        kind = m.type.decode("latin-1")
        if m.type in tarfile.REGULAR_TYPES:
            kind = "0"
        content = None
        if kind == "0" and m.size <= SMALL:
            content = archive.extractfile(m).read()
            if len(content) != m.size:
                return "the content is cut short"
            content = digest(content)
        entries.append({
            "path": m.name.encode("utf-8", "surrogateescape").hex(),
            "kind": kind,
            "mode": m.mode,
            "uid": m.uid,
            "gid": m.gid,
            "mtime": math.floor(m.mtime),
            "size": m.size,
            "link": m.linkname.encode("utf-8", "surrogateescape").hex(),
            "offset": m.offset_data if kind == "0" and m.size else None,
            "content": content,
        })
    return entries


lib = ctypes.CDLL(ctypes.util.find_library("archive") or "libarchive.so.13")
P, S, I, Q = ctypes.c_void_p, ctypes.c_char_p, ctypes.c_int, ctypes.c_int64


def declare(name, result, *arguments):
    function = getattr(lib, name)
    function.restype, function.argtypes = result, arguments
    return function


new = declare("archive_read_new", P)
free = declare("archive_read_free", I, P)
tar = declare("archive_read_support_format_tar", I, P)
options = declare("archive_read_set_options", I, P, S)
open_memory = declare("archive_read_open_memory", I, P, S, ctypes.c_size_t)
next_header = declare("archive_read_next_header", I, P, ctypes.POINTER(P))
error = declare("archive_error_string", S, P)
read = declare("archive_read_data", ctypes.c_ssize_t, P, P, ctypes.c_size_t)
position = declare("archive_filter_bytes", Q, P, I)
pathname = declare("archive_entry_pathname", S, P)
symlink = declare("archive_entry_symlink", S, P)
hardlink = declare("archive_entry_hardlink", S, P)
filetype = declare("archive_entry_filetype", ctypes.c_uint, P)
perm = declare("archive_entry_perm", ctypes.c_uint, P)
size = declare("archive_entry_size", Q, P)
uid = declare("archive_entry_uid", Q, P)
gid = declare("archive_entry_gid", Q, P)
mtime = declare("archive_entry_mtime", Q, P)

KINDS = {0o100000: "0", 0o120000: "2", 0o020000: "3", 0o060000: "4", 0o040000: "5", 0o010000: "6"}
WARN = -20


def with_libarchive(data):
    archive, entries, entry = new(), [], P()
    try:
        tar(archive)
        # Names are bytes: no conversion between character sets.
        options(archive, b"hdrcharset=BINARY")
        if open_memory(archive, data, len(data)) < 0:
            return (error(archive) or b"cannot open").decode("latin-1")
        while True:
            done = next_header(archive, ctypes.byref(entry))
            if done == 1:
                return entries
            if done < WARN:
                return (error(archive) or b"?").decode("latin-1")
            # It does not say what a hard link without a target is.
            kind = KINDS.get(filetype(entry), "1")
            link = b""
            if hardlink(entry) is not None:
                kind, link = "1", hardlink(entry)
            elif kind == "2":
                link = symlink(entry) or b""
            content = None
            if kind == "0" and 0 <= size(entry) <= SMALL:
                buffer = ctypes.create_string_buffer(size(entry) + 1)
                filled = 0
                while True:
                    n = read(archive, ctypes.byref(buffer, filled), len(buffer) - filled)
                    if n < 0:
                        return (error(archive) or b"?").decode("latin-1")
                    if n == 0 or filled > size(entry):
                        break
                    filled += n
                if filled != size(entry):
                    return "the content has another size"
                content = digest(buffer.raw[:filled])
            entries.append({
                "path": (pathname(entry) or b"").hex(),
                "kind": kind,
                "mode": perm(entry),
                "uid": uid(entry),
                "gid": gid(entry),
                "mtime": mtime(entry),
                "size": size(entry) if kind == "0" else 0,
                "link": link.hex(),
                "offset": None,
                "content": content,
            })
    finally:
        free(archive)


def listing(reader, data):
    try:
        return reader(data)
    except Exception as e:
        return f"{type(e).__name__}: {e}"


while True:
    length = sys.stdin.buffer.read(8)
    if len(length) < 8:
        break
    data = sys.stdin.buffer.read(int.from_bytes(length, "big"))
    answer = {
        "tarfile": listing(with_tarfile, data),
        "libarchive": listing(with_libarchive, data),
    }
    print(json.dumps(answer), flush=True)
