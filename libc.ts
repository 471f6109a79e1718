/**
 * The few calls of the C library that Bun does not offer, through bun:ffi, or null where they cannot be had.
 *
 * Everything here has a slower or weaker stand-in written with plain Bun, and each caller says which: this file only
 * answers whether the call is there. `REPRISE_FFI=0` in the environment switches all of it off.
 */
import type { Pointer } from "bun:ffi";

export interface Libc {
  /** sendfile(2): bytes sent, or -errno. */
  sendfile(socket: number, file: number, offset: number, length: number): number;
  /** recv(2) with MSG_DONTWAIT: bytes received, 0 at the end of the stream, or -errno. */
  receive(socket: number, into: Uint8Array): number;
  /** preadv2(2) with RWF_NOWAIT: bytes that the page cache had, or -errno (EAGAIN: it has none). */
  readCached(file: number, into: Uint8Array, offset: number): number;
  /** openat2(2) with O_PATH beneath `folder`, following no link: a descriptor, or -errno. */
  openBeneath(folder: number, path: string): number;
  /** flock(2), exclusive, not waiting: 0 or -errno. */
  lock(file: number): number;
  /** poll(2): whether the socket can be read, or has ended, within `ms`. Blocks the process. */
  waitReadable(socket: number, ms: number): boolean;
  /** isatty(3). */
  isTerminal(file: number): boolean;
}

/** Linux numbers, the same on x86-64 and arm64. */
export const Errno = {
  EPERM: 1,
  ENOENT: 2,
  EINTR: 4,
  EIO: 5,
  EAGAIN: 11,
  EACCES: 13,
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
const MSG_DONTWAIT = 0x40;
const RWF_NOWAIT = 0x8;
/** As the low half of pollfd's second word, whose high half the kernel fills in. */
const POLLIN = 1;
const LOCK_EX_NB = 2 | 4;
const O_PATH_NOFOLLOW_CLOEXEC = 0o10000000 | 0o400000 | 0o2000000;
/** RESOLVE_NO_MAGICLINKS | RESOLVE_NO_SYMLINKS | RESOLVE_BENEATH */
const RESOLVE_STRICTLY_BENEATH = 0x02 | 0x04 | 0x08;

let loaded: Libc | null | undefined;

/** Loaded at the first call, because that costs 2 ms and a small download may need none of it. */
export function libc(): Libc | null {
  loaded ??= process.env.REPRISE_FFI === "0" || process.platform !== "linux" ? null : load();
  return loaded;
}

function load(): Libc | null {
  for (const name of ["libc.so.6", `libc.musl-${process.arch === "arm64" ? "aarch64" : "x86_64"}.so.1`]) {
    try {
      return bind(name);
    } catch {
      // Not this C library; without any, the stand-ins serve.
    }
  }
  return null;
}

function bind(name: string): Libc {
  const { dlopen, FFIType, ptr: pointerTo, read } = require("bun:ffi") as typeof import("bun:ffi");
  const { i32, i64_fast: i64, u64, ptr } = FFIType;
  const { symbols: c } = dlopen(name, {
    sendfile: { args: [i32, i32, ptr, u64], returns: i64 },
    recv: { args: [i32, ptr, u64, i32], returns: i64 },
    preadv2: { args: [i32, ptr, i32, i64, i32], returns: i64 },
    syscall: { args: [i64, i32, ptr, ptr, u64], returns: i64 },
    flock: { args: [i32, i32], returns: i32 },
    poll: { args: [ptr, u64, i32], returns: i32 },
    isatty: { args: [i32], returns: i32 },
    __errno_location: { args: [], returns: ptr },
  });
  const errnoAt = c.__errno_location() as Pointer;
  const orErrno = (result: number | bigint): number => (result < 0 ? -read.i32(errnoAt) : Number(result));

  const at = new BigInt64Array(1);
  const pollfd = new Int32Array(2);
  const iovec = new BigUint64Array(2);
  const how = new BigUint64Array([BigInt(O_PATH_NOFOLLOW_CLOEXEC), 0n, BigInt(RESOLVE_STRICTLY_BENEATH)]);
  return {
    sendfile(socket, file, offset, length) {
      at[0] = BigInt(offset);
      return orErrno(c.sendfile(socket, file, at, length));
    },
    receive: (socket, into) => orErrno(c.recv(socket, into, into.length, MSG_DONTWAIT)),
    readCached(file, into, offset) {
      iovec[0] = BigInt(pointerTo(into));
      iovec[1] = BigInt(into.length);
      return orErrno(c.preadv2(file, iovec, 1, offset, RWF_NOWAIT));
    },
    openBeneath: (folder, path) =>
      orErrno(c.syscall(SYS_OPENAT2, folder, Buffer.from(`${path}\0`), how, how.byteLength)),
    lock: (file) => orErrno(c.flock(file, LOCK_EX_NB)),
    waitReadable(socket, ms) {
      pollfd[0] = socket;
      pollfd[1] = POLLIN;
      return c.poll(pollfd, 1, ms) > 0;
    },
    isTerminal: (file) => c.isatty(file) === 1,
  };
}
