/** What simulation.ts is made of: chance, time, and what stands in for a disk, for SQLite and for the ledger's file. */
import {
  type Decision,
  decide,
  type Member,
  type Proposal,
  type Record,
  recordOf,
  type Stretch,
  stretchOf,
  type Version,
} from "../ledger.ts";
import { type Entries, type Entry, isDirty } from "../replica.ts";

/** The same numbers for the same seed (mulberry32). */
export class Random {
  #state: number;

  constructor(seed: number) {
    this.#state = (seed * 0x9e3779b1) >>> 0;
  }

  /** In [0, 1). */
  next(): number {
    this.#state = (this.#state + 0x6d2b79f5) >>> 0;
    let t = this.#state;
    t = Math.imul(t ^ (t >>> 15), t | 1);
    t ^= t + Math.imul(t ^ (t >>> 7), t | 61);
    return ((t ^ (t >>> 14)) >>> 0) / 2 ** 32;
  }

  /** From `low` to `high`, both possible. */
  int(low: number, high: number): number {
    return low + Math.floor(this.next() * (high - low + 1));
  }

  chance(probability: number): boolean {
    return this.next() < probability;
  }

  pick<T>(items: readonly T[]): T {
    return items[Math.floor(this.next() * items.length)]!;
  }

  /** One of the names, as often as its weight says. */
  weighted<T extends string>(weights: { [name in T]: number }): T {
    const names = Object.keys(weights) as T[];
    let left = this.next() * names.reduce((sum, name) => sum + weights[name], 0);
    for (const name of names) {
      left -= weights[name];
      if (left < 0) return name;
    }
    return names.at(-1)!;
  }
}

// ---------------------------------------------------------------------------------------------------- time

interface Task {
  at: number;
  order: number;
  run: () => void;
}

/** What is to happen, the earliest first: a binary heap. */
export class Queue {
  now = 0;
  #order = 0;
  readonly #heap: Task[] = [];

  after(delay: number, run: () => void): void {
    this.#heap.push({ at: this.now + delay, order: this.#order++, run });
    this.#up(this.#heap.length - 1);
  }

  /** Does what is next; false if there is nothing. */
  runNext(): boolean {
    const first = this.#heap[0];
    if (!first) return false;
    const last = this.#heap.pop()!;
    if (this.#heap.length > 0) {
      this.#heap[0] = last;
      this.#down(0);
    }
    this.now = first.at;
    first.run();
    return true;
  }

  #isBefore(a: number, b: number): boolean {
    const [x, y] = [this.#heap[a]!, this.#heap[b]!];
    return x.at < y.at || (x.at === y.at && x.order < y.order);
  }

  #swap(a: number, b: number): void {
    const kept = this.#heap[a]!;
    this.#heap[a] = this.#heap[b]!;
    this.#heap[b] = kept;
  }

  #up(index: number): void {
    for (let at = index; at > 0; ) {
      const parent = (at - 1) >> 1;
      if (!this.#isBefore(at, parent)) return;
      this.#swap(at, parent);
      at = parent;
    }
  }

  #down(index: number): void {
    for (let at = index; ; ) {
      let least = at;
      for (const child of [2 * at + 1, 2 * at + 2]) {
        if (child < this.#heap.length && this.#isBefore(child, least)) least = child;
      }
      if (least === at) return;
      this.#swap(at, least);
      at = least;
    }
  }
}

// ---------------------------------------------------------------------------------------------------- tree

/** What a path holds. A folder's `etag` is always the same. */
export interface Content {
  version: Version;
  etag: string;
}

const FOLDER_ETAG = "folder";

export class Tree {
  readonly paths = new Map<string, Content>();
  #etags = 0;

  etag(path: string): string {
    return this.paths.get(path)?.etag ?? "";
  }

  kind(path: string): Version["kind"] {
    return this.paths.get(path)?.version.kind ?? "gone";
  }

  below(folder: string): string[] {
    const start = `${folder}/`;
    return [...this.paths.keys()].filter((path) => path.startsWith(start));
  }

  set(path: string, version: Version): void {
    const etag = version.kind === "folder" ? FOLDER_ETAG : `e${++this.#etags}`;
    this.paths.set(path, { version, etag });
  }

  remove(path: string): void {
    this.paths.delete(path);
  }

  /** With all that is below it; what they were called, and are now. */
  rename(path: string, to: string): string[] {
    const moved = [path, ...this.below(path)];
    const touched: string[] = [];
    for (const from of moved) {
      const name = to + from.slice(path.length);
      this.paths.set(name, this.paths.get(from)!);
      this.paths.delete(from);
      touched.push(from, name);
    }
    return touched;
  }

  /** Makes the folders above a path; which were made, or the file that is in the way. */
  makeAbove(path: string): { made: string[]; obstacle?: string } {
    const made: string[] = [];
    for (const folder of above(path)) {
      const kind = this.kind(folder);
      if (kind === "file") return { made, obstacle: folder };
      if (kind === "folder") continue;
      this.set(folder, { kind: "folder", size: 0, mtime: 0, sha256: "" });
      made.push(folder);
    }
    return { made };
  }

  holds(sha256: string): boolean {
    for (const { version } of this.paths.values()) if (version.sha256 === sha256) return true;
    return false;
  }
}

/** The folders that a path is in, outermost first. */
export function above(path: string): string[] {
  const segments = path.split("/");
  return segments.slice(1).map((_, index) => segments.slice(0, index + 1).join("/"));
}

// ---------------------------------------------------------------------------------------------------- index

export interface Store extends Entries {
  paths(): Iterable<string>;
}

/** Like the index, in memory. */
export class MapEntries implements Store {
  readonly #entries = new Map<string, Entry>();

  get(path: string): Entry | undefined {
    const entry = this.#entries.get(path);
    return entry && { ...entry };
  }

  set(entry: Entry): void {
    this.#entries.set(entry.path, { ...entry });
  }

  remove(path: string): void {
    this.#entries.delete(path);
  }

  open(): Entry[] {
    const open = [...this.#entries.values()].filter((entry) => entry.target || entry.sent || isDirty(entry));
    return open.map((entry) => ({ ...entry })).sort((a, b) => (a.target?.revision ?? 0) - (b.target?.revision ?? 0));
  }

  based(): string[] {
    return [...this.#entries.values()].filter(({ base }) => base > 0).map(({ path }) => path);
  }

  paths(): Iterable<string> {
    return [...this.#entries.keys()];
  }
}

/** How many of the last steps a power cut may take. */
const LOSABLE_STEPS = 6;

/** Entries of which the last steps can be undone, as SQLite may after a power cut. */
export class JournaledEntries implements Store {
  readonly #inner: Store;
  #undo: { cursor: number; before: [string, Entry | undefined][] }[] = [];

  constructor(inner: Store) {
    this.#inner = inner;
  }

  begin(cursor: number): void {
    this.#undo.push({ cursor, before: [] });
    if (this.#undo.length > LOSABLE_STEPS) this.#undo.shift();
  }

  /** Goes back by so many steps; where the cursor was, undefined if there is no step. */
  lose(steps: number): number | undefined {
    const lost = this.#undo.splice(Math.max(0, this.#undo.length - steps)).reverse();
    for (const { before } of lost) for (const change of before.reverse()) this.#restore(change);
    return lost.at(-1)?.cursor;
  }

  #restore([path, entry]: [string, Entry | undefined]): void {
    if (entry) this.#inner.set(entry);
    else this.#inner.remove(path);
  }

  #note(path: string): void {
    this.#undo.at(-1)?.before.push([path, this.#inner.get(path)]);
  }

  /** Another object than the one that is kept, which is what can be gone back to. */
  get = (path: string) => {
    const entry = this.#inner.get(path);
    return entry && { ...entry };
  };
  open = () => this.#inner.open();
  based = () => this.#inner.based();
  paths = () => this.#inner.paths();

  set(entry: Entry): void {
    this.#note(entry.path);
    this.#inner.set(entry);
  }

  remove(path: string): void {
    this.#note(path);
    this.#inner.remove(path);
  }
}

// ---------------------------------------------------------------------------------------------------- ledger

/** As EmbeddedLedger forgets members. */
export const FORGET_MEMBER_MS = 30 * 24 * 3600 * 1000;

/** Like EmbeddedLedger, in memory. */
export class MemoryLedger {
  revision = 0;
  pruned = 0;
  /** In the order of their revisions. */
  readonly #records = new Map<string, Record>();
  readonly #members = new Map<string, Member & { seen: number }>();

  append(origin: string, proposals: Proposal[]): { decisions: Decision[]; records: Record[] } {
    const records: Record[] = [];
    const decisions = proposals.map((proposal) => {
      const current = this.newest(proposal.path);
      const decision = decide(current, proposal);
      if (decision) return decision;
      const record = recordOf(proposal, ++this.revision, origin, current);
      this.#records.delete(record.path);
      this.#records.set(record.path, record);
      records.push(record);
      return { revision: record.revision };
    });
    return { decisions, records };
  }

  newest(path: string): Record | undefined {
    return this.#records.get(path);
  }

  read(after: number, limit: number, isWithinSnapshot = false): Stretch {
    return stretchOf(this, after, limit, isWithinSnapshot);
  }

  records(after: number, limit: number): Record[] {
    return [...this.#records.values()].filter(({ revision }) => revision > after).slice(0, limit);
  }

  members(): (Member & { seen: number })[] {
    return [...this.#members.values()];
  }

  join(member: Member, now: number): void {
    this.#members.set(member.node, { ...member, seen: now });
  }

  prune(own: number, now: number): void {
    for (const { node, seen } of this.members()) if (seen < now - FORGET_MEMBER_MS) this.#members.delete(node);
    const passed = Math.min(own, ...this.members().map(({ revision }) => revision));
    for (const { path, kind, revision } of [...this.#records.values()]) {
      if (kind !== "gone" || revision > passed) continue;
      this.#records.delete(path);
      this.pruned = passed;
    }
  }

  close(): void {}
}
