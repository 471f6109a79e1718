/**
 * What folders have in common in either direction: sharing the work out among connections, counting, comparing, walking.
 *
 * All files of a command share a few connections, on each of which many requests are under way at a time (pipeline.ts).
 * What is to be sent becomes known bit by bit, and no more of it is held than that takes. See treeget.ts and treeput.ts.
 */
import { closeSync, constants, fstatSync, lstatSync, openSync, readdirSync } from "node:fs";
import { join } from "node:path";
import { formatSize, print, printable, showsProgress } from "./command.ts";
import { type Context, Failures, remoteJoin } from "./context.ts";
import { crc32Of } from "./disk.ts";
import type { Peer } from "./peer.ts";
import type { Exchange } from "./pipeline.ts";
import { type Entry, type EntryKind, type Meta, quote, RepriseError, toJson } from "./protocol.ts";
import type { Remote } from "./remote.ts";
import { asLocal, isUnfinished } from "./resume.ts";
import { asLocalSource } from "./source.ts";
import { errorCode, isHidden } from "./storage.ts";
import { isSame, printDone, resumable } from "./transfer.ts";

/** Files that are synced and get their names together, at most. */
export const MAX_GROUP = 256;

export interface TreeOptions {
  /** Folders that are named are meant with all that is in them. */
  recursive: boolean;
  /** Remove what the source does not have. */
  delete: boolean;
  /** Also if the source is empty or not there. */
  force: boolean;
  /** Only say what would be done. */
  dryRun: boolean;
  /** Compare content rather than size and time. */
  checksum: boolean;
  noClobber: boolean;
  /** For resume logs of uploads. */
  directory: string;
}

/** What has been done, for the progress line and the summary. */
export interface Tally {
  files: number;
  bytes: number;
  /** Files and bytes that are to be sent, as far as is known. */
  plannedFiles: number;
  plannedBytes: number;
  isPlanned: boolean;
  unchanged: number;
  removed: number;
}

/** A file or folder on the server, and its name in the local folder that it comes to; "" is that folder itself. */
export interface RemoteRoot {
  path: string;
  name: string;
}

/** A local file or folder, and its name in the folder on the server that it goes to; "" is that folder itself. */
export interface LocalRoot {
  file: string;
  name: string;
}

export type Known = { kind: EntryKind | "other"; size: number; mtime: number };

/** What both directions have in common: sharing the work out, counting, saying. */
export abstract class Transfer {
  readonly context: Context;
  readonly options: TreeOptions;
  readonly failures = new Failures();
  readonly tally: Tally = {
    files: 0,
    bytes: 0,
    plannedFiles: 0,
    plannedBytes: 0,
    isPlanned: false,
    unchanged: 0,
    removed: 0,
  };
  #line: { update(): void } | undefined;

  constructor(context: Context, options: TreeOptions) {
    this.context = context;
    this.options = options;
  }

  protected abstract work(): Promise<void>;
  protected abstract readonly name: string;

  async run(): Promise<Tally> {
    const line = showsProgress() ? new (await import("./terminal.ts")).FolderLine(this.name, this.tally) : undefined;
    this.#line = line;
    try {
      await this.work();
      this.failures.throwFirst();
      return this.tally;
    } catch (error) {
      throw resumable(error);
    } finally {
      line?.end();
    }
  }

  done(path: string, file: string, meta: Meta, offset: number, started: number): Promise<void> | undefined {
    this.tally.files++;
    this.#line?.update();
    return this.context.json ? printDone(this.context, { path, file, ...meta, offset, started }) : undefined;
  }

  /** So many more bytes went over. */
  moved(bytes: number): void {
    this.tally.bytes += bytes;
    this.#line?.update();
  }

  /** Whether what is there already needs nothing: a folder, or a file that is left as it is or the same. */
  protected isLeft(item: Known, there: Known | undefined): boolean {
    if (item.kind !== there?.kind) return false;
    if (item.kind === "folder") return true;
    const isLeft = this.options.noClobber || (!this.options.checksum && isSame(item, there));
    if (isLeft) this.tally.unchanged++;
    return isLeft;
  }

  /** `name` is what it gets on the other side: "" for a folder that becomes the one there. */
  protected isMeant(kind: EntryKind, name: string, path: string): boolean {
    if (kind === "file" && name !== "") return true;
    if (kind === "folder" && this.options.recursive) return true;
    this.failures.add(
      kind === "file"
        ? new RepriseError("not_a_folder", `not a folder: ${quote(path)}`)
        : new RepriseError("not_a_file", `not a file: ${quote(path)} is a folder; -r takes all that is in it`),
    );
    return false;
  }

  protected plan(bytes: number): void {
    this.tally.plannedFiles++;
    this.tally.plannedBytes += bytes;
  }

  /** For `--dry-run`; `action path size` is the contract for `--json`. */
  protected async announce(action: string, path: string, size = 0): Promise<void> {
    await print(this.context.json ? toJson({ action, path, size }) : `${action} ${printable(path)}`);
  }

  /** Another connection to the server. */
  protected connect(): Remote {
    return this.context.connectTo(this.context.server);
  }

  /** Runs the exchanges over as many connections as there are jobs, and no more than there are exchanges. */
  protected async share(batches: AsyncIterator<Exchange[]>, beforeWait?: () => Promise<void>): Promise<void> {
    const shared = new Shared(batches);
    const count = await shared.countUpTo(this.context.jobs);
    const remotes = Array.from({ length: count }, () => this.connect());
    let failure: unknown;
    await Promise.all(
      remotes.map(async (remote) => {
        try {
          await remote.run(() => shared.next(), beforeWait);
        } catch (error) {
          failure ??= error;
          for (const other of remotes) other.giveUp();
        } finally {
          remote.close();
        }
      }),
    );
    if (failure) throw failure;
  }
}

/** Work that several connections take from, as it becomes known. */
class Shared {
  readonly #batches: AsyncIterator<Exchange[]>;
  #ready: Exchange[] = [];
  #at = 0;
  #more: Promise<boolean> | undefined;

  constructor(batches: AsyncIterator<Exchange[]>) {
    this.#batches = batches;
  }

  /** At once where one is known; undefined at the end. */
  next(): Exchange | undefined | Promise<Exchange | undefined> {
    return this.#ready[this.#at] ? this.#ready[this.#at++] : this.#wait();
  }

  /** How many there are, if less than `limit`. */
  async countUpTo(limit: number): Promise<number> {
    while (this.#ready.length < limit && (await this.#fill()));
    return Math.min(limit, this.#ready.length);
  }

  async #wait(): Promise<Exchange | undefined> {
    while (!this.#ready[this.#at]) if (!(await this.#fill())) return undefined;
    return this.#ready[this.#at++];
  }

  /** One more batch; several who ask for it at the same time get the same. False at the end. */
  #fill(): Promise<boolean> {
    this.#more ??= this.#batches.next().then(({ value, done }) => {
      this.#more = undefined;
      if (done) return false;
      this.#ready = [...this.#ready.slice(this.#at), ...value];
      this.#at = 0;
      return true;
    });
    return this.#more;
  }
}

// ---------------------------------------------------------------------------------------------------- remote

/** What is to come here: its path is relative to the local folder, `remote` is where it is on the server. */
export interface Item extends Entry {
  remote: string;
}

/** What the server has under these names; those that are not there are told to `missing`, if anybody wants to know. */
export async function lookRemotely(
  remote: Remote,
  roots: RemoteRoot[],
  missing?: (error: RepriseError) => void,
): Promise<Item[]> {
  const looks = roots.map((root) => new Look(root));
  await remote.run([...looks]);
  return looks.flatMap(({ item, error }) => {
    if (item) return item;
    if (missing) missing(error!);
    else if (error!.code !== "not_found") throw error;
    return [];
  });
}

class Look implements Exchange {
  readonly #root: RemoteRoot;
  item: Item | undefined;
  error: RepriseError | undefined;

  constructor(root: RemoteRoot) {
    this.#root = root;
  }

  ask(peer: Peer): Promise<void> {
    return peer.ask({ action: "stat", path: this.#root.path });
  }

  async take(peer: Peer): Promise<boolean> {
    const { kind, size, mtime } = await peer.expectHeld("meta");
    this.item = { path: this.#root.name, remote: this.#root.path, kind, size, mtime };
    return false;
  }

  failed(error: RepriseError): void {
    this.error = error;
  }
}

// ---------------------------------------------------------------------------------------------------- local

/** What is there locally, under a path relative to the folder that was walked. */
export interface LocalEntry {
  path: string;
  kind: EntryKind;
  size: number;
  mtime: number;
}

/** As PUT's fields for what is new and comes in one go. */
export const NEW_FILE = { action: "put", id: "", offset: 0, noClobber: false, parents: true, etag: "" } as const;

/** Undefined for what is not there; links and devices have a kind that nothing has. Throws `local`. */
export function lookLocally(file: string): (Omit<LocalEntry, "kind"> & { kind: EntryKind | "other" }) | undefined {
  const stat = lstatIfThere(file);
  if (!stat) return undefined;
  const kind = stat.isFile() ? "file" : stat.isDirectory() ? "folder" : "other";
  return { path: file, kind, size: Number(stat.size), mtime: Number(stat.mtimeNs / 1000n) };
}

function lstatIfThere(file: string) {
  try {
    return lstatSync(file, { bigint: true, throwIfNoEntry: false });
  } catch (error) {
    // Below a file that has a folder's name there is nothing, either.
    if (errorCode(error) === "ENOTDIR") return undefined;
    throw asLocal(error, file);
  }
}

/**
 * Files and folders below `root`, a folder before what is in it. `enter` tells whether to look into a folder; what is
 * neither, or left by an unfinished transfer, is told to `leftOut`.
 */
export function* walk(
  root: string,
  enter: (path: string) => boolean = () => true,
  leftOut: () => void = () => {},
  failures = new Failures(),
): Generator<LocalEntry> {
  const waiting = [""];
  for (let folder = waiting.pop(); folder !== undefined; folder = waiting.pop()) {
    for (const name of namesIn(join(root, folder), failures)) {
      const path = remoteJoin(folder, name);
      const found = lookOrFail(join(root, path), failures);
      if (!found) continue;
      if (found.kind === "other" || isHidden(name) || isUnfinished(name)) leftOut();
      else {
        if (found.kind === "folder" && enter(path)) waiting.push(path);
        yield { path, kind: found.kind, size: found.size, mtime: found.mtime };
      }
    }
  }
}

function lookOrFail(file: string, failures: Failures): ReturnType<typeof lookLocally> {
  try {
    const found = lookLocally(file);
    if (found) return found;
    const why = file.includes("\ufffd") ? "its name is not UTF-8" : "it is not there any more";
    throw new RepriseError("local", `cannot read ${quote(file)}: ${why}`);
  } catch (error) {
    failures.add(error);
    return undefined;
  }
}

function namesIn(folder: string, failures: Failures): string[] {
  try {
    return readdirSync(folder);
  } catch (error) {
    failures.add(asLocalSource(error, folder));
    return [];
  }
}

/** Whether a local file has these checksums, and no more. Throws `local`. */
export async function sameContent(sums: { length: number; crc32: number }[], file: string): Promise<boolean> {
  try {
    const fd = openSync(file, constants.O_RDONLY | constants.O_NONBLOCK);
    try {
      return await hasSums(fd, sums);
    } finally {
      closeSync(fd);
    }
  } catch (error) {
    throw asLocalSource(error, file);
  }
}

async function hasSums(fd: number, sums: { length: number; crc32: number }[]): Promise<boolean> {
  let at = 0;
  for (const { length, crc32 } of sums) {
    if ((await crc32Of(fd, at, length)) !== crc32) return false;
    at += length;
  }
  return at === fstatSync(fd).size;
}

export function emptySource(path: string, where: string): RepriseError {
  return new RepriseError(
    "usage",
    `${quote(path)} is empty ${where}: everything would be removed; --force does it all the same`,
  );
}

/** `12 files, 3.4 MB; 100 unchanged, 2 removed`. */
export function summary({ files, bytes, unchanged, removed }: Tally): string {
  const done = `${files} ${files === 1 ? "file" : "files"}, ${formatSize(bytes)}`;
  return `${done}; ${unchanged} unchanged${removed > 0 ? `, ${removed} removed` : ""}`;
}
