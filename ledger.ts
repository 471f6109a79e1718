/**
 * The ledger: the one ordered log of changes that all members of a cluster follow, and who the members are.
 *
 * Each record says what a path is to be from its revision on; only the newest of a path is kept. A change is proposed with
 * the revision that it was based on, and `decide` says what becomes of it. `EmbeddedLedger` keeps the log in SQLite at the
 * master; a member sees its master's through the link between them (cluster.ts), and hands it on to members of its own.
 * `EtcdLedger` of etcdledger.ts keeps it in etcd, where every member reads it and none is the master.
 */
import { Database, type Statement } from "bun:sqlite";
import { randomUUID } from "node:crypto";
import type { MaybePromise } from "./storage.ts";

/** What a path is: a file's content, a folder, or nothing. */
export interface Version {
  kind: "file" | "folder" | "gone";
  /** Bytes; of a file alone, as all of these. */
  size: number;
  /** Microseconds since 1970. */
  mtime: number;
  /** Hexadecimal. */
  sha256: string;
}

export interface Record extends Version {
  path: string;
  /** Position in the log, from 1 on. */
  revision: number;
  /** The member that made the change. */
  origin: string;
  /** sha256 of the file that it took the place of, if one: whoever holds that has lost nothing. */
  over: string;
}

export interface Proposal {
  path: string;
  /** Revision of the record that the change was made on; 0: there was none. */
  base: number;
  version: Version;
}

/** What became of a proposal: its revision, or that of the record that stands against it. */
export type Decision = { revision: number } | { refusedFor: number };

/** As a member is known to the others. */
export interface Member {
  node: string;
  /** What clients are told: `host:port`. */
  address: string;
  /** It has all of the log up to here in its tree. */
  revision: number;
}

/** A stretch of the log: all that is newer than `after`, up to `revision`. */
export interface Stretch {
  after: number;
  revision: number;
  records: Record[];
  /** It begins with nothing, since deletions are missing from the log before; `complete` with its last stretch. */
  snapshot?: "part" | "complete";
}

/** What stretches are read from: the ledger, or what a member knows of it. */
export interface Log {
  readonly revision: number;
  /** Deletions up to here are not in it any more. */
  readonly pruned: number;
  /**
   * Newer than a revision, in order: so many of them, or more, since it never ends between records of one revision. etcd
   * gives one to all that a transaction holds.
   */
  records(after: number, limit: number): Record[];
}

/** What became of proposals, and the records that were made of them. */
export interface Appended {
  decisions: Decision[];
  records: Record[];
}

/** Where the log is kept, and who follows it. All of it is on disk when it returns or resolves, or an error is thrown. */
export interface Ledger {
  /** Names this log: revisions of another mean nothing. */
  readonly id: string;
  /** Of the newest record, as far as this one has heard. */
  readonly revision: number;
  /** As of a `Log`. */
  readonly pruned: number;
  /** Begins anew, empty and under another name, since it is not the one that members know. */
  renew(): MaybePromise<void>;
  /** Decides proposals in order, each by compare and set: see `decide`. */
  append(origin: string, proposals: Proposal[]): MaybePromise<Appended>;
  newest(path: string): MaybePromise<Record | undefined>;
  /** As of a `Log`. */
  records(after: number, limit: number): MaybePromise<Record[]>;
  /** What is newer than a revision, or a snapshot, a piece at a time: see `stretchOf`. */
  read(after: number, limit: number, isWithinSnapshot?: boolean): MaybePromise<Stretch>;
  /** Calls back whenever there is something newer. */
  watch(onNews: () => void): MaybePromise<void>;
  /** Everyone who has ever joined and was not forgotten. `seen`: when it was last there, in ms since 1970. */
  members(): MaybePromise<(Member & { seen: number })[]>;
  /** A member is there, and has come so far. */
  join(member: Member, now?: number): MaybePromise<void>;
  /** Forgets members that have not been seen for a month, and the deletions that all others, and this one, have. */
  prune(own: number, now?: number): MaybePromise<void>;
  close(): MaybePromise<void>;
}

/** A deletion is forgotten once all members have it; one that has not been seen for so long is waited for no more. */
export const FORGET_MEMBER_MS = 30 * 24 * 3600 * 1000;

/** Records that are read together. */
export const STRETCH_RECORDS = 500;

export const GONE: Version = { kind: "gone", size: 0, mtime: 0, sha256: "" };
export const FOLDER: Version = { kind: "folder", size: 0, mtime: 0, sha256: "" };

/** A time that went through a double may be off by a microsecond. */
export function isSame(a: Version, b: Version): boolean {
  return hasSameContent(a, b) && (a.kind !== "file" || Math.abs(a.mtime - b.mtime) <= 1);
}

export function hasSameContent(a: Version, b: Version): boolean {
  return a.kind === b.kind && a.sha256 === b.sha256;
}

/**
 * What becomes of a proposal where `current` is the newest record of its path: a revision that it already has, a refusal, or
 * undefined for a new record. A change beats a deletion, and what is the same is no conflict.
 */
export function decide(current: Record | undefined, { base, version }: Proposal): Decision | undefined {
  if (!current) return version.kind === "gone" ? { revision: 0 } : undefined;
  if (isSame(current, version)) return { revision: current.revision };
  if (current.revision === base) return undefined;
  // Of just what was deleted it is no change: somebody says again what the deletion knew.
  const isKnown = version.kind === "file" && version.sha256 === current.over;
  if (current.kind === "gone" && !isKnown) return undefined;
  return { refusedFor: current.revision };
}

/** The record of a proposal that is taken. */
export function recordOf(proposal: Proposal, revision: number, origin: string, current: Record | undefined): Record {
  const { kind, size, mtime, sha256 } = proposal.version;
  return { path: proposal.path, revision, kind, size, mtime, sha256, origin, over: current?.sha256 ?? "" };
}

/**
 * What is newer than `after`, in order and `limit` records at the most: all there is, as a snapshot, where deletions since
 * then are forgotten. The further parts of one are read with `isWithinSnapshot`.
 */
export function stretchOf(log: Log, after: number, limit: number, isWithinSnapshot = false): Stretch {
  const start = startOf(log.pruned, after, isWithinSnapshot);
  return stretchWith({ ...start, limit, records: log.records(start.after, limit), revision: log.revision });
}

/** Where what is newer than `after` is read from. */
export function startOf(pruned: number, after: number, isWithinSnapshot: boolean) {
  const isSnapshot = isWithinSnapshot || after < pruned;
  return { after: isSnapshot && !isWithinSnapshot ? 0 : after, isSnapshot };
}

/** Of the records that were read from there; `revision` is the ledger's. */
export function stretchWith(
  read: { limit: number; isSnapshot: boolean } & Pick<Stretch, "after" | "revision" | "records">,
): Stretch {
  const { after, records, limit, isSnapshot } = read;
  const isAll = records.length < limit;
  const revision = isAll ? read.revision : records.at(-1)!.revision;
  if (!isSnapshot) return { after, revision, records };
  return { after, revision, records, snapshot: isAll ? "complete" : "part" };
}

// ---------------------------------------------------------------------------------------------------- SQLite

const SCHEMA = `
  CREATE TABLE IF NOT EXISTS records (
    path TEXT PRIMARY KEY, revision INTEGER NOT NULL UNIQUE, kind TEXT NOT NULL, size INTEGER NOT NULL,
    mtime INTEGER NOT NULL, sha256 TEXT NOT NULL, origin TEXT NOT NULL, over TEXT NOT NULL) WITHOUT ROWID;
  CREATE TABLE IF NOT EXISTS members (
    node TEXT PRIMARY KEY, address TEXT NOT NULL, revision INTEGER NOT NULL, seen INTEGER NOT NULL) WITHOUT ROWID;
  CREATE TABLE IF NOT EXISTS facts (name TEXT PRIMARY KEY, value) WITHOUT ROWID`;

/** In SQLite, synced with each append. */
export class EmbeddedLedger implements Ledger, Log {
  id: string;
  readonly #db: Database;
  readonly #newest: Statement<Record, [string]>;
  readonly #since: Statement<Record, [number, number]>;
  readonly #insert: Statement;
  readonly #watchers: (() => void)[] = [];
  #revision: number;
  #isTogether = false;

  /** Throws system errors, and what SQLite finds wrong with the file. */
  constructor(path: string) {
    this.#db = new Database(path, { create: true, readwrite: true });
    this.#db.run("PRAGMA busy_timeout = 5000");
    this.#db.run("PRAGMA journal_mode = WAL");
    this.#db.run("PRAGMA synchronous = FULL");
    for (const statement of SCHEMA.split(";")) this.#db.run(statement);
    this.#newest = this.#db.query("SELECT * FROM records WHERE path = ?");
    this.#since = this.#db.query("SELECT * FROM records WHERE revision > ? ORDER BY revision LIMIT ?");
    this.#insert = this.#db.query(
      // By path alone: that two records have one revision must fail.
      `INSERT INTO records VALUES ($path, $revision, $kind, $size, $mtime, $sha256, $origin, $over)
       ON CONFLICT (path) DO UPDATE SET revision = excluded.revision, kind = excluded.kind, size = excluded.size,
       mtime = excluded.mtime, sha256 = excluded.sha256, origin = excluded.origin, over = excluded.over`,
    );
    this.id = String(this.#fact("id") ?? this.#setFact("id", randomUUID()));
    this.#revision = Number(this.#fact("revision") ?? 0);
  }

  get revision(): number {
    return this.#revision;
  }

  renew(): void {
    this.#db.transaction(() => {
      this.#db.run("DELETE FROM records");
      this.id = this.#setFact("id", randomUUID());
    })();
  }

  watch(onNews: () => void): void {
    this.#watchers.push(onNews);
  }

  append(origin: string, proposals: Proposal[]): Appended {
    const before = this.#revision;
    const records: Record[] = [];
    try {
      const decisions = this.#db.transaction(() => {
        const decided = proposals.map((proposal) => {
          const current = this.newest(proposal.path);
          const decision = decide(current, proposal);
          if (decision) return decision;
          const record = recordOf(proposal, ++this.#revision, origin, current);
          this.#insert.run(bindings(record));
          records.push(record);
          return { revision: record.revision };
        });
        if (records.length > 0) this.#setFact("revision", this.#revision);
        return decided;
      })();
      if (records.length > 0 && !this.#isTogether) this.#tell();
      return { decisions, records };
    } catch (error) {
      this.#revision = before;
      throw error;
    }
  }

  #tell(): void {
    for (const onNews of this.#watchers) onNews();
  }

  newest(path: string): Record | undefined {
    return this.#newest.get(path) ?? undefined;
  }

  read(after: number, limit: number, isWithinSnapshot = false): Stretch {
    return stretchOf(this, after, limit, isWithinSnapshot);
  }

  records(after: number, limit: number): Record[] {
    return this.#since.all(after, limit);
  }

  /** Several appends as one. */
  together<T>(work: () => T): T {
    const before = this.#revision;
    this.#isTogether = true;
    try {
      return this.#db.transaction(work)();
    } catch (error) {
      this.#revision = before;
      throw error;
    } finally {
      this.#isTogether = false;
      if (this.#revision > before) this.#tell();
    }
  }

  get pruned(): number {
    return Number(this.#fact("pruned") ?? 0);
  }

  // ------------------------------------------------------------------------------------------------ members

  members(): (Member & { seen: number })[] {
    return this.#db.query<Member & { seen: number }, []>("SELECT * FROM members ORDER BY address").all();
  }

  join({ node, address, revision }: Member, now = Date.now()): void {
    this.#db.run("INSERT OR REPLACE INTO members VALUES (?, ?, ?, ?)", [node, address, revision, now]);
  }

  prune(own: number, now = Date.now()): void {
    this.#db.transaction(() => {
      this.#db.run("DELETE FROM members WHERE seen < ?", [now - FORGET_MEMBER_MS]);
      const passed = Math.min(own, ...this.members().map(({ revision }) => revision));
      const { changes } = this.#db.run("DELETE FROM records WHERE kind = 'gone' AND revision <= ?", [passed]);
      if (changes > 0) this.#setFact("pruned", passed);
    })();
  }

  close(): void {
    this.#db.close();
  }

  #fact(name: string): unknown {
    return this.#db.query<{ value: unknown }, [string]>("SELECT value FROM facts WHERE name = ?").get(name)?.value;
  }

  #setFact<T extends string | number>(name: string, value: T): T {
    this.#db.run("INSERT OR REPLACE INTO facts VALUES (?, ?)", [name, value]);
    return value;
  }
}

function bindings(record: Record): { [name: string]: string | number } {
  return Object.fromEntries(Object.entries(record).map(([name, value]) => [`$${name}`, value]));
}
