/**
 * The few calls of the C library that Bun does not offer, through bun:ffi, or null where they cannot be had.
 *
 * Everything here has a slower or weaker stand-in written with plain Bun, and each caller says which: this file only
 * answers whether the call is there. `REPRISE_FFI=0` in the environment switches all of it off.
 */
import type { Pointer } from "bun:ffi";
import { constants } from "node:fs";

export interface Libc {
  /** sendfile(2): bytes sent, or -errno. */
  sendfile(socket: number, file: number, offset: number, length: number): number;
  /** recv(2) with MSG_DONTWAIT: bytes received, 0 at the end of the stream, or -errno. */
  receive(socket: number, into: Uint8Array): number;
  /** ioctl(2) with SIOCOUTQ: bytes written to the socket that the peer's kernel has not acknowledged, or -errno. */
  unacknowledged(socket: number): number;
  /** preadv2(2) with RWF_NOWAIT: bytes that the page cache had, or -errno (EAGAIN: it has none). */
  readCached(file: number, into: Uint8Array, offset: number): number;
  /** openat2(2) with O_PATH beneath `folder`, following no link: a descriptor, or -errno. */
  openBeneath(folder: number, path: string): number;
  /** flock(2), exclusive, not waiting: 0 or -errno. */
  lock(file: number): number;
  unlock(file: number): void;
  /** poll(2): whether the socket can be read, or has ended, within `ms`. Blocks the process. */
  waitReadable(socket: number, ms: number): boolean;
  /** sync_file_range(2): sets going that the file's content is written to disk, and waits for nothing. */
  startWriting(file: number): void;
  /** openat(2) of a new file to read and write: a descriptor, or -errno. */
  createAt(folder: number, name: string, mode: number): number;
  /** renameat2(2) with RENAME_NOREPLACE: 0 or -errno. */
  renameNew(fromFolder: number, from: string, toFolder: number, to: string): number;
  /** isatty(3). */
  isTerminal(file: number): boolean;
}

/** What a listing needs. Bound on its own, because an old C library has the calls of `Libc` and not all of these. */
export interface FolderCalls {
  /** getdents64(2): bytes of records put into `into`, laid out as `Dirent` says, 0 at the end, or -errno. */
  readFolder(folder: number, into: Uint8Array): number;
  /** lseek(2): reads on where a record said that the next one is; 0 or -errno. */
  seekFolder(folder: number, position: bigint): number;
  /** statx(2) of the name that starts at `at` in `names` and ends with a NUL, following no link; or -errno. */
  statAt(folder: number, names: Uint8Array, at: number): Stat | number;
  /** What tells the version of what `statAt` looked at last. */
  identity(): Identity;
}

/** As in node's BigIntStats: nanoseconds since 1970. */
export interface Identity {
  ino: bigint;
  size: bigint;
  mtimeNs: bigint;
  ctimeNs: bigint;
}

/** What a service manager is told things with; a script that is not run by one needs none of it. */
export interface ServiceCalls {
  /**
   * Sends one datagram to a unix socket: 0 or -errno (EAGAIN: there is no room for it yet). `address` is a path, or
   * "@name" for a name without a file.
   */
  sendDatagram(address: string, message: string): number;
  /** clock_gettime(2) of CLOCK_MONOTONIC, in microseconds. */
  monotonicMicros(): bigint;
}

export interface Stat {
  kind: "file" | "folder" | "other";
  /** Bytes. */
  size: number;
  /** Microseconds since 1970, possibly negative; cut towards zero. */
  mtime: number;
}

/** Places in a record of getdents64: the position of the next i64, its length u16, the kind of the entry u8, its name up to a NUL. */
export const Dirent = { nextAt: 8, lengthAt: 16, kindAt: 18, nameAt: 19 } as const;
/** Kinds in such a record: not every file system tells. */
export const DirentKind = { unknown: 0, folder: 4, file: 8 } as const;

/** Linux numbers, the same on x86-64 and arm64. */
export const Errno = {
  EPERM: 1,
  ENOENT: 2,
  EINTR: 4,
  EIO: 5,
  EAGAIN: 11,
  EACCES: 13,
  EEXIST: 17,
  EXDEV: 18,
  ENOTDIR: 20,
  EINVAL: 22,
  ENFILE: 23,
  EMFILE: 24,
  ENAMETOOLONG: 36,
  ENOSYS: 38,
  ELOOP: 40,
  EOPNOTSUPP: 95,
} as const;

const SYS_OPENAT2 = 437;
const SIOCOUTQ = 0x5411;
const MSG_DONTWAIT = 0x40;
const RWF_NOWAIT = 0x8;
/** As the low half of pollfd's second word, whose high half the kernel fills in. */
const POLLIN = 1;
const SYNC_FILE_RANGE_WRITE = 2;
/** O_RDWR | O_CREAT | O_EXCL | O_NOFOLLOW | O_CLOEXEC */
const O_NEW = 0o2 | 0o100 | 0o200 | constants.O_NOFOLLOW | 0o2000000;
const RENAME_NOREPLACE = 1;
const SEEK_SET = 0;
const LOCK_EX_NB = 2 | 4;
const LOCK_UN = 8;
const AF_UNIX = 1;
/** SOCK_DGRAM | SOCK_CLOEXEC */
const SOCK_DATAGRAM = 2 | 0o2000000;
const MSG_NOSIGNAL = 0x4000;
/** Of sockaddr_un: the family u16, then a path and its NUL, or a NUL and a name. */
const SUN_PATH_AT = 2;
const SUN_PATH_BYTES = 108;
const CLOCK_MONOTONIC = 1;
const O_PATH_NOFOLLOW_CLOEXEC = 0o10000000 | 0o400000 | 0o2000000;
/** RESOLVE_NO_MAGICLINKS | RESOLVE_NO_SYMLINKS | RESOLVE_BENEATH */
const RESOLVE_STRICTLY_BENEATH = 0x02 | 0x04 | 0x08;
/** AT_SYMLINK_NOFOLLOW | AT_NO_AUTOMOUNT */
const AT_THE_NAME_ITSELF = 0x100 | 0x800;
/** STATX_TYPE | STATX_MTIME | STATX_CTIME | STATX_INO | STATX_SIZE */
const STATX_WANTED = 0x1 | 0x40 | 0x80 | 0x100 | 0x200;
const STATX_BYTES = 256;
/** Places in what statx fills in, the same on every architecture. */
const Statx = { mode: 28, ino: 32, size: 40, ctime: 96, mtimeSeconds: 112, mtimeNanoseconds: 120 } as const;
const S_IFMT = 0o170000;
const S_IFREG = 0o100000;
const S_IFDIR = 0o040000;

let loaded: Libc | null | undefined;
let folderCallsLoaded: FolderCalls | null | undefined;
let serviceCallsLoaded: ServiceCalls | null | undefined;

/** Loaded at the first call, because that costs 2 ms and a small download may need none of it. */
export function libc(): Libc | null {
  if (loaded === undefined) loaded = load(bind);
  return loaded;
}

/** The same for listings. */
export function folderCalls(): FolderCalls | null {
  if (folderCallsLoaded === undefined) folderCallsLoaded = load(bindFolderCalls);
  return folderCallsLoaded;
}

/** The same for a service. */
export function serviceCalls(): ServiceCalls | null {
  if (serviceCallsLoaded === undefined) serviceCallsLoaded = load(bindServiceCalls);
  return serviceCallsLoaded;
}

function load<T>(bindTo: (name: string) => T): T | null {
  if (process.env.REPRISE_FFI === "0" || process.platform !== "linux") return null;
  for (const name of ["libc.so.6", `libc.musl-${process.arch === "arm64" ? "aarch64" : "x86_64"}.so.1`]) {
    try {
      return bindTo(name);
    } catch {
      // Not this C library; without any, the stand-ins serve.
    }
  }
  return null;
}

function bind(name: string): Libc {
  const { dlopen, FFIType, ptr: pointerTo, read } = require("bun:ffi") as typeof import("bun:ffi");
  const { i32, u32, i64_fast: i64, u64, ptr } = FFIType;
  const { symbols: c } = dlopen(name, {
    sendfile: { args: [i32, i32, ptr, u64], returns: i64 },
    recv: { args: [i32, ptr, u64, i32], returns: i64 },
    ioctl: { args: [i32, u64, ptr], returns: i32 },
    preadv2: { args: [i32, ptr, i32, i64, i32], returns: i64 },
    syscall: { args: [i64, i32, ptr, ptr, u64], returns: i64 },
    flock: { args: [i32, i32], returns: i32 },
    poll: { args: [ptr, u64, i32], returns: i32 },
    sync_file_range: { args: [i32, i64, i64, u32], returns: i32 },
    openat: { args: [i32, ptr, i32, u32], returns: i32 },
    renameat2: { args: [i32, ptr, i32, ptr, u32], returns: i32 },
    isatty: { args: [i32], returns: i32 },
    __errno_location: { args: [], returns: ptr },
  });
  const errnoAt = c.__errno_location() as Pointer;
  const orErrno = (result: number | bigint): number => (result < 0 ? -read.i32(errnoAt) : Number(result));

  const at = new BigInt64Array(1);
  const pollfd = new Int32Array(2);
  const count = new Int32Array(1);
  const iovec = new BigUint64Array(2);
  const how = new BigUint64Array([BigInt(O_PATH_NOFOLLOW_CLOEXEC), 0n, BigInt(RESOLVE_STRICTLY_BENEATH)]);
  return {
    sendfile(socket, file, offset, length) {
      at[0] = BigInt(offset);
      return orErrno(c.sendfile(socket, file, at, length));
    },
    unacknowledged: (socket) => (c.ioctl(socket, SIOCOUTQ, count) < 0 ? -read.i32(errnoAt) : count[0]!),
    receive: (socket, into) => orErrno(c.recv(socket, into, into.length, MSG_DONTWAIT)),
    readCached(file, into, offset) {
      iovec[0] = BigInt(pointerTo(into));
      iovec[1] = BigInt(into.length);
      return orErrno(c.preadv2(file, iovec, 1, offset, RWF_NOWAIT));
    },
    openBeneath: (folder, path) => orErrno(c.syscall(SYS_OPENAT2, folder, cString(path), how, how.byteLength)),
    lock: (file) => orErrno(c.flock(file, LOCK_EX_NB)),
    unlock: (file) => void c.flock(file, LOCK_UN),
    waitReadable(socket, ms) {
      pollfd[0] = socket;
      pollfd[1] = POLLIN;
      return c.poll(pollfd, 1, ms) > 0;
    },
    startWriting: (file) => void c.sync_file_range(file, 0, 0, SYNC_FILE_RANGE_WRITE),
    createAt: (folder, name, mode) => orErrno(c.openat(folder, cString(name), O_NEW, mode)),
    renameNew: (fromFolder, from, toFolder, to) =>
      orErrno(c.renameat2(fromFolder, cString(from), toFolder, cString(to, 1), RENAME_NOREPLACE)),
    isTerminal: (file) => c.isatty(file) === 1,
  };
}

function bindFolderCalls(name: string): FolderCalls {
  const { dlopen, FFIType, ptr: pointerTo, read } = require("bun:ffi") as typeof import("bun:ffi");
  const { i32, i64, u64, ptr } = FFIType;
  const types = { args: [i32, ptr, u64], returns: i32 } as const;
  // The same call: musl keeps the longer name for old programs only, where dlsym does not find it.
  const getdents = name.startsWith("libc.musl")
    ? dlopen(name, { getdents: types }).symbols.getdents
    : dlopen(name, { getdents64: types }).symbols.getdents64;
  const { symbols: c } = dlopen(name, {
    statx: { args: [i32, ptr, i32, i32, ptr], returns: i32 },
    lseek: { args: [i32, i64, i32], returns: i64 },
    __errno_location: { args: [], returns: ptr },
  });
  const errnoAt = c.__errno_location() as Pointer;
  const stat = new Uint8Array(STATX_BYTES);
  const view = new DataView(stat.buffer);
  return {
    readFolder(folder, into) {
      const count = getdents(folder, into, into.length);
      return count < 0 ? -read.i32(errnoAt) : count;
    },
    seekFolder: (folder, position) => (c.lseek(folder, position, SEEK_SET) < 0 ? -read.i32(errnoAt) : 0),
    statAt(folder, names, at) {
      const name = (pointerTo(names) + at) as Pointer;
      return c.statx(folder, name, AT_THE_NAME_ITSELF, STATX_WANTED, stat) < 0 ? -read.i32(errnoAt) : readStat(view);
    },
    identity: () => ({
      ino: view.getBigUint64(Statx.ino, true),
      size: view.getBigUint64(Statx.size, true),
      mtimeNs: nanosecondsAt(view, Statx.mtimeSeconds),
      ctimeNs: nanosecondsAt(view, Statx.ctime),
    }),
  };
}

function bindServiceCalls(name: string): ServiceCalls {
  const { dlopen, FFIType, read } = require("bun:ffi") as typeof import("bun:ffi");
  const { i32, u32, u64, i64_fast: i64, ptr } = FFIType;
  const { symbols: c } = dlopen(name, {
    socket: { args: [i32, i32, i32], returns: i32 },
    sendto: { args: [i32, ptr, u64, i32, ptr, u32], returns: i64 },
    close: { args: [i32], returns: i32 },
    clock_gettime: { args: [i32, ptr], returns: i32 },
    __errno_location: { args: [], returns: ptr },
  });
  const errnoAt = c.__errno_location() as Pointer;
  const orErrno = (result: number | bigint): number => (result < 0 ? -read.i32(errnoAt) : 0);
  return {
    sendDatagram(address, message) {
      const place = socketAddress(address);
      if (!place) return -Errno.ENAMETOOLONG;
      const bytes = encoder.encode(message);
      const fd = c.socket(AF_UNIX, SOCK_DATAGRAM, 0);
      if (fd < 0) return orErrno(fd);
      try {
        return orErrno(c.sendto(fd, bytes, bytes.length, MSG_DONTWAIT | MSG_NOSIGNAL, place, place.length));
      } finally {
        c.close(fd);
      }
    },
    monotonicMicros() {
      const time = new BigInt64Array(2);
      c.clock_gettime(CLOCK_MONOTONIC, time);
      return time[0]! * 1_000_000n + time[1]! / 1000n;
    },
  };
}

/** A sockaddr_un, as long as it is; undefined where the name does not fit. */
function socketAddress(address: string): Uint8Array | undefined {
  const isAbstract = address.startsWith("@");
  // The NUL stands before a name, and behind a path.
  const name = encoder.encode(isAbstract ? `\0${address.slice(1)}` : `${address}\0`);
  if (name.length > SUN_PATH_BYTES) return undefined;
  const bytes = new Uint8Array(SUN_PATH_AT + name.length);
  new DataView(bytes.buffer).setUint16(0, AF_UNIX, true);
  bytes.set(name, SUN_PATH_AT);
  return bytes;
}

function readStat(view: DataView): Stat {
  const type = view.getUint16(Statx.mode, true) & S_IFMT;
  const kind = type === S_IFREG ? "file" : type === S_IFDIR ? "folder" : "other";
  const size = view.getUint32(Statx.size, true) + view.getUint32(Statx.size + 4, true) * 2 ** 32;
  return { kind, size, mtime: readTime(view) };
}

function nanosecondsAt(view: DataView, at: number): bigint {
  return view.getBigInt64(at, true) * 1_000_000_000n + BigInt(view.getUint32(at + 8, true));
}

/** Nanoseconds count forward, before 1970 as well: there, cutting towards zero is rounding up. */
function readTime(view: DataView): number {
  const at = Statx.mtimeSeconds;
  const seconds = view.getUint32(at, true) + view.getInt32(at + 4, true) * 2 ** 32;
  const nanoseconds = view.getUint32(Statx.mtimeNanoseconds, true);
  const below = seconds * 1_000_000 + Math.floor(nanoseconds / 1000);
  return below < 0 && nanoseconds % 1000 > 0 ? below + 1 : below;
}

const encoder = new TextEncoder();
const textPlaces = [new Uint8Array(16 * 1024), new Uint8Array(16 * 1024)] as const;

/** For a call that is made at once; two at a time. */
function cString(text: string, place: 0 | 1 = 0): Uint8Array {
  const bytes = textPlaces[place];
  const { read, written } = encoder.encodeInto(text, bytes);
  if (read < text.length || written === bytes.length) throw new RangeError("A path too long for any call");
  bytes[written] = 0;
  return bytes;
}
