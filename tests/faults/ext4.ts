/**
 * A file system of its own for a test: ext4 in an image on a loop device, whose power can be cut.
 *
 * `commit=60` keeps the kernel from writing by itself what nobody has synced while the test runs.
 */
import { dlopen, FFIType } from "bun:ffi";
import { closeSync, constants, mkdirSync, openSync, truncateSync, writeFileSync } from "node:fs";
import { join } from "node:path";
import { temporaryFolder, waitFor } from "../fixtures.ts";

/** EXT4_IOC_SHUTDOWN, and its flag to forget even what is in the journal's memory: EXT4_GOING_FLAGS_NOLOGFLUSH. */
const SHUTDOWN = 0x8004587d;
const WITHOUT_JOURNAL = 2;
/** For `mkfs.ext4`, which is not everywhere on the path of an ordinary shell. */
const PATH = `${process.env.PATH ?? ""}:/usr/sbin:/sbin`;

export interface Disk extends AsyncDisposable {
  /** Where it is mounted. */
  path: string;
  /** From now on every access is an error, and what was not synced will not have been. */
  cutPower(): void;
  /** Unmounts it, and mounts what was on the disk. */
  mountAgain(): Promise<void>;
}

/** Why there is no such disk here, if so. */
export async function whyNoDisk(): Promise<string | undefined> {
  if (process.getuid?.() !== 0) return "only root can mount a disk";
  const tools = ["mount", "umount", "mkfs.ext4"].filter((tool) => !Bun.which(tool, { PATH }));
  if (tools.length > 0) return `${tools.join(", ")} not installed`;
  try {
    await using disk = await mountDisk("8M");
    disk.cutPower();
    return undefined;
  } catch (error) {
    return (error as Error).message;
  }
}

/** A new, empty one, with further words for `mkfs.ext4`. */
export async function mountDisk(size: string, ...words: string[]): Promise<Disk> {
  const folder = temporaryFolder();
  const image = join(folder.path, "image");
  const path = join(folder.path, "disk");
  const unmount = async () => {
    // Whoever used it may be on the way out.
    await waitFor("the disk can be unmounted", () => run("umount", path).exitCode === 0).catch(() =>
      run("umount", "-l", path),
    );
  };
  try {
    mkdirSync(path);
    writeFileSync(image, "");
    truncateSync(image, bytesOf(size));
    check(run("mkfs.ext4", "-q", "-F", ...words, image), "an ext4 file system cannot be made here");
    mount(image, path);
  } catch (error) {
    folder[Symbol.dispose]();
    throw error;
  }
  return {
    path,
    cutPower: () => shutDown(path),
    async mountAgain() {
      await unmount();
      mount(image, path);
    },
    async [Symbol.asyncDispose]() {
      await unmount();
      folder[Symbol.dispose]();
    },
  };
}

function bytesOf(size: string): number {
  return Number.parseInt(size, 10) * 1024 * 1024;
}

function mount(image: string, path: string): void {
  check(run("mount", "-o", "loop,commit=60", image, path), "a file system in a file cannot be mounted here");
}

function run(...cmd: string[]) {
  return Bun.spawnSync(cmd, { env: { ...process.env, PATH }, stdio: ["ignore", "ignore", "pipe"] });
}

function check({ exitCode, stderr }: { exitCode: number; stderr: Buffer }, problem: string): void {
  if (exitCode !== 0) throw new Error(`${problem}: ${stderr.toString().trim()}`);
}

function shutDown(path: string): void {
  const { symbols, close } = dlopen("libc.so.6", {
    ioctl: { args: [FFIType.i32, FFIType.u64, FFIType.ptr], returns: FFIType.i32 },
  });
  const fd = openSync(path, constants.O_RDONLY | constants.O_DIRECTORY);
  try {
    if (symbols.ioctl(fd, SHUTDOWN, new Uint32Array([WITHOUT_JOURNAL])) !== 0)
      throw new Error("ext4 here cannot be shut down");
  } finally {
    closeSync(fd);
    close();
  }
}
