/**
 * Names that are swapped for links to outside while they are being resolved, as fast as one process can, and another
 * that asks for them meanwhile. Run by abuse.test.ts, once with openat2 and once with the walk:
 *
 * ```sh
 * REPRISE_FFI=0 bun tests/races.ts FOLDER middle write 100000
 * ```
 *
 * FOLDER is made by `makeArena`: `root` with what may be reached, `outside` with what may not. Of each round it is checked
 * that nothing of outside came; every thousand rounds, and at the end, that nothing in outside has changed. What is
 * printed is how many rounds reached what is inside, and how many were refused: a race has both.
 */
import { dlopen, FFIType } from "bun:ffi";
import {
  constants,
  lstatSync,
  openSync,
  readdirSync,
  readFileSync,
  renameSync,
  rmSync,
  symlinkSync,
  writeFileSync,
} from "node:fs";
import { join } from "node:path";
import { type FolderChange, openChanges } from "../changes.ts";
import { libc } from "../libc.ts";
import { type Put, RepriseError, UNKNOWN_SIZE } from "../protocol.ts";
import { openFolder } from "../storage.ts";
import { writeTree } from "./fixtures.ts";

export interface Tally {
  inside: number;
  refused: number;
}
export type Race = "last read" | "last write" | "middle read" | "middle write";

const INSIDE = "inside";
const AT_FDCWD = -100;
const RENAME_EXCHANGE = 2;
const LOOK_EVERY = 1000;
/** The swapper looks this often whether somebody still wants it. */
const ORPHAN_EVERY = 4096;

export function makeArena(folder: string): void {
  const below = (word: string) => ({ secret: word, victim: word, [`sub/${word}`]: word, [`sub/deep/${word}`]: word });
  const named = (top: string, word: string) =>
    Object.fromEntries(Object.entries(below(word)).map(([name, content]) => [`${top}/${name}`, content]));
  writeTree(folder, { ...named("outside", "outside!"), ...named("root/folder", INSIDE), "root/file": INSIDE });
  symlinkSync("../outside", join(folder, "root", "folder-link"));
  symlinkSync("../outside/secret", join(folder, "root", "file-link"));
}

// ---------------------------------------------------------------------------------------------------- swapping

/** Never returns. `file` is made anew each time where the one that was there may be removed or replaced. */
function swap(root: string, filesStay: boolean): never {
  process.chdir(root);
  const { symbols } = openLibc();
  const name = (text: string) => Buffer.from(`${text}\0`);
  const pairs = ["folder", "file"].map((text) => [name(text), name(`${text}-link`)] as const);
  const [folders, files] = pairs as [(typeof pairs)[0], (typeof pairs)[0]];
  const parent = process.ppid;
  process.stdout.write("go");
  for (let round = 0; ; round++) {
    symbols.renameat2(AT_FDCWD, folders[0], AT_FDCWD, folders[1], RENAME_EXCHANGE);
    if (filesStay) symbols.renameat2(AT_FDCWD, files[0], AT_FDCWD, files[1], RENAME_EXCHANGE);
    else renewFile(round);
    if (round % ORPHAN_EVERY === 0 && process.ppid !== parent) process.exit();
  }
}

function renewFile(round: number): void {
  if (round % 2 === 0) writeFileSync("file-new", INSIDE);
  else symlinkSync("../outside/secret", "file-new");
  renameSync("file-new", "file");
}

function openLibc() {
  const { i32, u32, ptr } = FFIType;
  const types = { renameat2: { args: [i32, ptr, i32, ptr, u32], returns: i32 } } as const;
  try {
    return dlopen("libc.so.6", types);
  } catch {
    return dlopen(`libc.musl-${process.arch === "arm64" ? "aarch64" : "x86_64"}.so.1`, types);
  }
}

// ---------------------------------------------------------------------------------------------------- asking

/** One thing to ask for; it returns what must be what is inside, and throws a refusal. */
type Attempt = () => Promise<string>;

function reading(root: string, place: string): Attempt[] {
  const served = openFolder(root);
  const [file, folder] = place === "last" ? ["file", "folder"] : ["folder/secret", "folder/sub"];
  const names = place === "last" ? "secret,sub,victim" : "deep,inside";
  const listed = async (recursive: boolean) => {
    const entries = (await Array.fromAsync(served.list(folder, recursive))).flat();
    const top = entries.map(({ path }) => path).filter((path) => !path.includes("/"));
    // A folder that went away in the middle of a list is left out of it.
    const below = entries.map(({ path }) => path).filter((path) => path.includes("/"));
    if (below.some((path) => path.includes("outside"))) return below.join();
    return top.sort().join() === names ? INSIDE : top.join();
  };
  return [
    async () => {
      const opened = await served.open(file);
      try {
        return Buffer.from(await opened.read(0, opened.meta.size)).toString();
      } finally {
        opened.close();
      }
    },
    async () => {
      const found = served.readNow(file);
      if (!found) throw new RepriseError("refused");
      return Buffer.from(found.content).toString();
    },
    async () => {
      const { kind, size } = await served.stat(file);
      return kind === "file" && size === INSIDE.length ? INSIDE : `${kind} of ${size} bytes`;
    },
    () => listed(false),
    () => listed(true),
  ];
}

function writing(root: string, place: string): Attempt[] {
  const changes = openChanges(root);
  // The true folder, whatever name it has at the moment.
  const inside = `/proc/self/fd/${openSync(join(root, "folder"), constants.O_RDONLY | constants.O_DIRECTORY)}`;
  const apply = async (change: FolderChange) => {
    const [outcome] = await changes.apply([change]);
    if (outcome instanceof RepriseError) throw outcome;
    return INSIDE;
  };
  const put = (path: string, parents: boolean) => async () => {
    const upload = changes.receive(putOf(path, parents), false);
    try {
      upload.write(Buffer.from("put"));
      return await apply(upload);
    } finally {
      upload.close();
    }
  };
  const remove = (path: string) => () => apply({ action: "remove", path, recursive: false });
  const moveFrom = (path: string) => async () => {
    await apply({ action: "move", path, to: "moved", overwrite: true });
    // The link itself may have been moved, which leads to nothing that is served.
    const moved = join(root, "moved");
    return lstatSync(moved).isSymbolicLink() ? INSIDE : readFileSync(moved, "utf8").replace("put", INSIDE);
  };
  const moveTo = (path: string) => () => {
    writeFileSync(join(root, "movable"), "put");
    return apply({ action: "move", path: "movable", to: path, overwrite: true });
  };
  const mkdir = (path: string, parents: boolean) => () => apply({ action: "mkdir", path, parents });
  if (place === "last") return [put("file", false), remove("file"), moveFrom("file"), moveTo("file")];
  const renewed = (attempt: Attempt) => async () => {
    writeFileSync(`${inside}/victim`, INSIDE);
    for (const name of ["made", "made-above", "sub/made"])
      rmSync(`${inside}/${name}`, { recursive: true, force: true });
    return attempt();
  };
  const attempts = [
    ...[put("folder/put", false), put("folder/made/put", true), remove("folder/victim"), moveFrom("folder/victim")],
    ...[moveTo("folder/moved"), mkdir("folder/made", false), mkdir("folder/made-above/made", true)],
    // Here the swapped name is not the last of the folder's either.
    ...[put("folder/sub/put", false), mkdir("folder/sub/made", false)],
  ];
  return attempts.map(renewed);
}

function putOf(path: string, parents: boolean): Put {
  const fields = { id: "", offset: 0, size: UNKNOWN_SIZE, mtime: 0, noClobber: false, etag: "" };
  return { action: "put", path, parents, ...fields };
}

/** What can be known of what is in outside without reading it. */
function looksOf(outside: string): string {
  const names = readdirSync(outside, { recursive: true }).map(String).sort();
  return ["", ...names]
    .map((name) => {
      const { ino, size, mode, nlink, mtimeNs, ctimeNs } = lstatSync(join(outside, name), { bigint: true });
      return [name, ino, size, mode, nlink, mtimeNs, ctimeNs].join();
    })
    .join("\n");
}

async function ask(attempts: Attempt[], outside: string, rounds: number): Promise<Tally> {
  const before = looksOf(outside);
  const check = () => {
    if (looksOf(outside) !== before) throw new Error(`outside is not what it was: ${before} --- ${looksOf(outside)}`);
  };
  const tally: Tally = { inside: 0, refused: 0 };
  for (let round = 0; round < rounds; round++) {
    if (round % LOOK_EVERY === 0) check();
    try {
      const found = await attempts[round % attempts.length]!();
      if (found !== INSIDE) throw new Error(`attempt ${round % attempts.length} found ${found}`);
      tally.inside++;
    } catch (error) {
      if (!(error instanceof RepriseError) || error.code === "failed") throw error;
      tally.refused++;
    }
  }
  check();
  return tally;
}

// ---------------------------------------------------------------------------------------------------- main

/** Asks while another process swaps. */
async function race(folder: string, place: string, way: string, rounds: number): Promise<Tally> {
  const root = join(folder, "root");
  // Before anything is swapped, for what is opened here by its name.
  const attempts = way === "read" ? reading(root, place) : writing(root, place);
  const filesStay = way === "read" ? "stay" : "go";
  const swapper = Bun.spawn([process.execPath, import.meta.path, folder, "swap", filesStay], {
    stdio: ["ignore", "pipe", "inherit"],
  });
  try {
    await swapper.stdout.getReader().read();
    return await ask(attempts, join(folder, "outside"), rounds);
  } finally {
    swapper.kill("SIGKILL");
    await swapper.exited;
  }
}

if (import.meta.main) {
  const [folder, place, way, rounds] = process.argv.slice(2) as [string, string, string, string];
  if (place === "swap") swap(join(folder, "root"), way === "stay");
  if ((libc() === null) !== (process.env.REPRISE_FFI === "0")) throw new Error("not the way that was asked for");
  // A file that has just changed would be looked at again after a while; that wait is not what is raced here.
  const { now } = Date;
  Date.now = () => now() + 60_000;
  console.log(JSON.stringify(await race(folder, place, way, Number(rounds))));
  process.exit();
}
