/**
 * What a tree holds, as events for replica.ts: files that any program has changed are found by their etag, and hashed.
 *
 * Three things lead here: a worker names paths that a client has changed, the kernel says that something happened, and at
 * the start, each hour and when the kernel lost count, everything is looked at. What is found is checked once more when
 * it is taken in, because the keeper itself changes the tree meanwhile.
 */
import { type FSWatcher, watch } from "node:fs";
import { nextTurn } from "./connection.ts";
import type { Index } from "./index.ts";
import { FOLDER, GONE, type Version } from "./ledger.ts";
import { type Entry as Listed, type Meta, RepriseError } from "./protocol.ts";
import { type Folder, isHidden } from "./storage.ts";

/** Of a file that is read to be hashed. */
const CHUNK_BYTES = 1024 * 1024;
/** What happens to a path within this time is looked at once. */
const GATHER_MS = 20;
const SCAN_MS = 3600 * 1000;
/** Findings that are handed on together. */
const MAX_FOUND = 500;

const UNKNOWN = Symbol("unknown");

export interface Finding {
  path: string;
  version: Version;
  etag: string;
}

/** Compares a tree with the index. */
export class Observer {
  readonly #root: Folder;
  readonly #index: Index;
  /** Takes findings in; those that are no longer true it leaves out. */
  readonly #take: (found: Finding[]) => Promise<void>;
  readonly #onError: (error: unknown) => void;
  #watcher: FSWatcher | undefined;
  #gathered = new Set<string>();
  #timer: Timer | undefined;
  #scanTimer: Timer | undefined;

  constructor(
    root: Folder,
    index: Index,
    { take, onError }: { take: (found: Finding[]) => Promise<void>; onError: (error: unknown) => void },
  ) {
    this.#root = root;
    this.#index = index;
    this.#take = take;
    this.#onError = onError;
  }

  /** Looks at everything, now and each hour, and at what changes from now on. Resolves after the first look. */
  async start(path: string): Promise<void> {
    try {
      this.#watcher = watch(path, { recursive: true }, (_, name) => this.#gather(name));
      this.#watcher.on("error", this.#onError);
    } catch (error) {
      // Without it the hourly look has to do.
      this.#onError(error);
    }
    this.#scanTimer = setInterval(() => this.#scan(), SCAN_MS);
    await this.#scan();
  }

  /** Looks at these paths, and at all that is below them; resolves when it is taken in. */
  async examine(paths: Iterable<string>): Promise<void> {
    const found = new Findings();
    for (const path of paths) await this.#examineOne(path, found).catch(this.#onError);
    await this.#handOn(found.present.splice(0));
    await this.#handOn(found.gone);
  }

  /** Whether what was found is what the tree has now. */
  isStill({ path, version, etag }: Finding): boolean {
    const there = this.#look(path);
    if (there === UNKNOWN) return false;
    return (there?.kind ?? "gone") === version.kind && (there?.etag ?? "") === etag;
  }

  close(): void {
    this.#watcher?.close();
    clearTimeout(this.#timer);
    clearInterval(this.#scanTimer);
  }

  #scan(): Promise<void> {
    return this.examine([""]);
  }

  /** An event without a name: the kernel lost count. */
  #gather(name: string | Buffer | null): void {
    const path = name === null ? "" : String(name);
    if (path.split("/").some(isHidden)) return;
    this.#gathered.add(path);
    this.#timer ??= setTimeout(() => {
      this.#timer = undefined;
      const paths = this.#gathered;
      this.#gathered = new Set();
      this.examine(paths);
    }, GATHER_MS);
  }

  async #examineOne(path: string, found: Findings): Promise<void> {
    const there = path === "" ? ({ kind: "folder" } as const) : this.#look(path);
    const known = path === "" ? undefined : this.#index.get(path);
    if (there === UNKNOWN) return;
    if (there?.kind === "file") {
      if (known?.seen.kind !== "file" || known.etag !== there.etag) await this.#hash(path, found);
      if (known?.seen.kind === "folder") this.#reportGoneBelow(path, new Set(), found);
      return;
    }
    if (!there) {
      if (known && known.seen.kind !== "gone") found.add(path, GONE, "");
      // Something was there as a folder, or its entry is that of a folder that went long ago.
      return this.#reportGoneBelow(path, new Set(), found);
    }
    if (path !== "") {
      this.#examineParents(path, found);
      if (known?.seen.kind !== "folder") found.add(path, FOLDER, "");
    }
    await this.#examineBelow(path, found);
  }

  /** What is made with the folders above it is one change of all of them. */
  #examineParents(path: string, found: Findings): void {
    for (let at = path.lastIndexOf("/"); at > 0; at = path.lastIndexOf("/", at - 1)) {
      const folder = path.slice(0, at);
      if (this.#index.get(folder)?.seen.kind === "folder") return;
      found.add(folder, FOLDER, "");
    }
  }

  async #examineBelow(folder: string, found: Findings): Promise<void> {
    const seen = new Set<string>();
    try {
      for await (const entries of this.#root.list(folder, true, true)) {
        for (const entry of entries) {
          const path = folder === "" ? entry.path : `${folder}/${entry.path}`;
          seen.add(path);
          await this.#compare(path, entry, found);
        }
      }
    } catch (error) {
      // A list that is cut says nothing of what is missing from it.
      // Without the root nothing can be told of what was in it.
      if (folder !== "" && error instanceof RepriseError && error.code === "not_found")
        return this.#examineOne(folder, found);
      throw error;
    }
    this.#reportGoneBelow(folder, seen, found);
  }

  async #compare(path: string, { kind, etag = "" }: Listed, found: Findings): Promise<void> {
    if (this.#index.isSeen(path, kind, etag)) return;
    if (kind === "folder") found.add(path, FOLDER, "");
    else await this.#hash(path, found);
    if (found.present.length >= MAX_FOUND) await this.#handOn(found.present.splice(0));
  }

  #reportGoneBelow(folder: string, seen: Set<string>, found: Findings): void {
    for (const { path, seen: version } of this.#index.below(folder)) {
      if (version.kind !== "gone" && !seen.has(path) && this.#look(path) === undefined) found.add(path, GONE, "");
    }
  }

  /** A file that changes while it is hashed is looked at again: the kernel says when. */
  async #hash(path: string, found: Findings): Promise<void> {
    this.#examineParents(path, found);
    try {
      const { version, etag } = await hashOf(this.#root, path);
      found.add(path, version, etag);
    } catch (error) {
      if (!(error instanceof RepriseError)) throw error;
      if (error.code === "changed" || error.code === "not_found") this.#gather(path);
      else if (error.code === "failed" || error.code === "refused") this.#onError(error);
    }
  }

  /** Only what is certainly not there is gone: not what may not be looked at, nor a link that has taken a name. */
  #look(path: string): Meta | undefined | typeof UNKNOWN {
    try {
      return this.#root.look(path);
    } catch (error) {
      if (error instanceof RepriseError && error.code !== "failed") return UNKNOWN;
      throw error;
    }
  }

  async #handOn(found: Finding[]): Promise<void> {
    if (found.length > 0) await this.#take(found);
  }
}

/** Of one look. What is gone comes last: then what was renamed is known by its new name, wherever its old one is removed. */
class Findings {
  readonly present: Finding[] = [];
  readonly gone: Finding[] = [];

  add(path: string, version: Version, etag: string): void {
    (version.kind === "gone" ? this.gone : this.present).push({ path, version, etag });
  }
}

/** A file's version by its content. Throws `changed`, `not_found`, `failed`. */
export async function hashOf(root: Folder, path: string): Promise<{ version: Version; etag: string }> {
  const now = root.readNow(path);
  if (now) return { version: fileVersion(now.meta, Bun.SHA256.hash(now.content, "hex")), etag: now.meta.etag };
  const file = await root.open(path);
  try {
    const { size, etag } = file.meta;
    const hasher = new Bun.CryptoHasher("sha256");
    for (let at = 0; at < size; at += CHUNK_BYTES) {
      hasher.update(await file.read(at, Math.min(CHUNK_BYTES, size - at)));
      await nextTurn();
    }
    file.verify();
    return { version: fileVersion(file.meta, hasher.digest("hex")), etag };
  } finally {
    file.close();
  }
}

function fileVersion({ size, mtime }: { size: number; mtime: number }, sha256: string): Version {
  return { kind: "file", size, mtime, sha256 };
}
