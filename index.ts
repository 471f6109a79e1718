/**
 * What a member knows of each path, in SQLite beside the tree: the entries of replica.ts, and how far it has come.
 *
 * One process of a server writes it, the keeper; its workers read it, to name a file's version by its content and to know
 * what is elsewhere. It can be made anew from the tree and the ledger, so a power cut may take its last words.
 */
import { Database, type Statement } from "bun:sqlite";
import { randomUUID } from "node:crypto";
import { existsSync } from "node:fs";
import { GONE, type Record, type Version } from "./ledger.ts";
import { type Entries, type Entry, isDirty } from "./replica.ts";

export const INDEX_FILE = "index.sqlite";

const SCHEMA = `
  CREATE TABLE IF NOT EXISTS entries (
    path TEXT PRIMARY KEY, base INTEGER NOT NULL, etag TEXT NOT NULL, digest TEXT NOT NULL, open INTEGER NOT NULL,
    revision INTEGER NOT NULL, seen TEXT NOT NULL, known TEXT, sent TEXT, target TEXT, passed TEXT) WITHOUT ROWID;
  CREATE INDEX IF NOT EXISTS open ON entries (path) WHERE open = 1;
  CREATE INDEX IF NOT EXISTS target ON entries (revision) WHERE target IS NOT NULL;
  CREATE INDEX IF NOT EXISTS revision ON entries (revision) WHERE revision > 0;
  CREATE INDEX IF NOT EXISTS digest ON entries (digest) WHERE digest <> '';
  CREATE TABLE IF NOT EXISTS facts (name TEXT PRIMARY KEY, value) WITHOUT ROWID`;

/** Of the log of SQLite, 16 MiB: pages that many changes touch are then put in their place once for all of them. */
const CHECKPOINT_PAGES = 4_000;
/** Entries, or that there is none, that are kept in memory. */
const MAX_KEPT = 5_000;

interface Row {
  path: string;
  base: number;
  etag: string;
  /** sha256 of what is in the tree; "" for what is no file. */
  digest: string;
  open: number;
  /** Of the newest record that is known. */
  revision: number;
  /** JSON, as the others. */
  seen: string;
  /** Null for the same as `seen`. */
  known: string | null;
  sent: string | null;
  target: string | null;
  /** Null for none. */
  passed: string | null;
}

/** As the keeper has it, the only one that writes. */
export class Index implements Entries {
  readonly #db: Database;
  /** What was asked for of late: an entry is asked for many times until a change is through. */
  readonly #kept = new Map<string, Entry | null>();
  readonly #get: Statement<Row, [string]>;
  readonly #seen: Statement<Pick<Row, "etag" | "seen">, [string]>;
  readonly #set: Statement;
  readonly #remove: Statement;

  constructor(path: string) {
    this.#db = new Database(path, { create: true, readwrite: true });
    this.#db.run("PRAGMA busy_timeout = 5000");
    this.#db.run("PRAGMA journal_mode = WAL");
    this.#db.run("PRAGMA synchronous = NORMAL");
    this.#db.run(`PRAGMA wal_autocheckpoint = ${CHECKPOINT_PAGES}`);
    for (const statement of SCHEMA.split(";")) this.#db.run(statement);
    this.#get = this.#db.query("SELECT * FROM entries WHERE path = ?");
    this.#seen = this.#db.query("SELECT etag, seen FROM entries WHERE path = ?");
    this.#set = this.#db.query("INSERT OR REPLACE INTO entries VALUES (?, ?, ?, ?, ?, ?, ?, ?, ?, ?, ?)");
    this.#remove = this.#db.query("DELETE FROM entries WHERE path = ?");
  }

  get(path: string): Entry | undefined {
    const kept = this.#kept.get(path);
    if (kept !== undefined) return kept ?? undefined;
    const row = this.#get.get(path);
    return this.#keep(path, row ? entryOf(row) : null) ?? undefined;
  }

  set(entry: Entry): void {
    const { path, base, etag, seen, known, sent, target, passed } = entry;
    this.#keep(path, entry);
    const [seenText, knownText] = [textOf(seen), textOf(known)];
    const isOpen = target !== undefined || sent !== undefined || isDirty(entry);
    this.#set.run(
      path,
      base,
      etag,
      seen.sha256,
      isOpen ? 1 : 0,
      target?.revision ?? base,
      seenText,
      knownText === seenText ? null : knownText,
      sent ? textOf(sent) : null,
      target ? JSON.stringify(target) : null,
      passed.length > 0 ? JSON.stringify(passed) : null,
    );
  }

  remove(path: string): void {
    this.#keep(path, null);
    this.#remove.run(path);
  }

  #keep(path: string, entry: Entry | null): Entry | null {
    if (this.#kept.size >= MAX_KEPT) this.#kept.clear();
    this.#kept.set(path, entry);
    return entry;
  }

  /** Whether that is what was last seen under a name. */
  isSeen(path: string, kind: "file" | "folder", etag: string): boolean {
    const row = this.#seen.get(path);
    return row?.etag === etag && row.seen.startsWith(`["${kind}"`);
  }

  /** In the order of the log. */
  open(): Entry[] {
    const rows = this.#db.query<Row, []>("SELECT * FROM entries WHERE open = 1").all();
    return rows.map(entryOf).sort((a, b) => (a.target?.revision ?? 0) - (b.target?.revision ?? 0));
  }

  get openCount(): number {
    return this.#db.query<{ n: number }, []>("SELECT count(*) AS n FROM entries WHERE open = 1").get()!.n;
  }

  based(): string[] {
    const rows = this.#db.query<{ path: string }, []>("SELECT path FROM entries WHERE base > 0").all();
    return rows.map(({ path }) => path);
  }

  /** All that something was seen of in a folder, however deep, in the order of their names, a thousand at a time. */
  *below(folder: string): Generator<Entry> {
    let [after, end] = folder === "" ? ["", "\u{10ffff}"] : [`${folder}/`, `${folder}0`];
    const query = this.#db.query<Row, [string, string]>(
      "SELECT * FROM entries WHERE path > ? AND path < ? ORDER BY path LIMIT 1000",
    );
    for (;;) {
      const rows = query.all(after, end);
      for (const row of rows) yield entryOf(row);
      if (rows.length < 1000) return;
      after = rows.at(-1)!.path;
    }
  }

  /** Where the tree has, or had when last seen, a file of that content. */
  withContent(sha256: string): Entry[] {
    return this.#db
      .query<Row, [string]>("SELECT * FROM entries WHERE digest = ? AND digest <> '' LIMIT 8")
      .all(sha256)
      .map(entryOf);
  }

  /** Revisions of another ledger mean nothing: what was seen of the tree stays. */
  forgetLedger(): void {
    this.#kept.clear();
    const none = textOf(GONE);
    this.#db.run("DELETE FROM entries WHERE digest = '' AND seen = ?", [none]);
    this.#db.run(
      "UPDATE entries SET base = 0, revision = 0, open = 1, known = ?, sent = NULL, target = NULL, passed = NULL",
      [none],
    );
  }

  /**
   * The newest record of each path that is newer than `after`, in order: as far as the index goes, what a ledger says. It
   * does not end between records of one revision: see `Log`.
   */
  records(after: number, limit: number): Record[] {
    const sql = "SELECT * FROM entries WHERE revision > ?1 AND revision <= ?2 AND revision > 0 ORDER BY revision, path";
    const last = "SELECT revision FROM entries WHERE revision > ? AND revision > 0 ORDER BY revision LIMIT 1 OFFSET ?";
    const end = this.#db.query<{ revision: number }, [number, number]>(last).get(after, limit - 1)?.revision;
    const rows = this.#db.query<Row, [number, number]>(sql).all(after, end ?? Number.MAX_SAFE_INTEGER);
    return rows.map((row) => {
      const { path, base, known, target } = entryOf(row);
      return target ?? { path, revision: base, ...known, origin: "", over: "" };
    });
  }

  /** Forgets deletions up to a revision; returns how many. */
  prune(revision: number): number {
    this.#kept.clear();
    const gone = textOf(GONE);
    const sql = "DELETE FROM entries WHERE seen = ? AND open = 0 AND revision > 0 AND revision <= ?";
    return this.#db.run(sql, [gone, revision]).changes;
  }

  /** Of all records, the newest. */
  get newest(): { path: string; revision: number } | undefined {
    const sql = "SELECT path, revision FROM entries WHERE revision > 0 ORDER BY revision DESC LIMIT 1";
    return this.#db.query<{ path: string; revision: number }, []>(sql).get() ?? undefined;
  }

  /** Of the records that the tree does not have yet, the oldest; undefined if it has all. */
  get oldestTarget(): number | undefined {
    const sql = "SELECT min(revision) AS least FROM entries INDEXED BY target WHERE target IS NOT NULL";
    return this.#db.query<{ least: number | null }, []>(sql).get()?.least ?? undefined;
  }

  /** Made at the first time. */
  get node(): string {
    return String(this.fact("node") ?? this.setFact("node", randomUUID()));
  }

  fact(name: string): string | number | undefined {
    const query = this.#db.query<{ value: string | number }, [string]>("SELECT value FROM facts WHERE name = ?");
    return query.get(name)?.value;
  }

  setFact<T extends string | number>(name: string, value: T): T {
    this.#db.run("INSERT OR REPLACE INTO facts VALUES (?, ?)", [name, value]);
    return value;
  }

  transaction<T>(work: () => T): T {
    // Begun as one that reads, it would fail at once where a reader is just bringing the file in order after a kill.
    return this.#db.transaction(work).immediate();
  }

  close(): void {
    this.#db.close();
  }
}

/** What a worker wants to know of a path. */
export interface Known {
  /** The storage's, of the file of which `digest` is the content; "" for none. */
  etag: string;
  digest: string;
  /** What is to be there and is not yet. */
  target: Record | undefined;
}

/** As workers read it. */
export class IndexReader {
  readonly #db: Database;
  readonly #get: Statement<Pick<Row, "etag" | "digest" | "target">, [string]>;

  private constructor(path: string) {
    this.#db = new Database(path, { readonly: true });
    this.#db.run("PRAGMA busy_timeout = 5000");
    this.#get = this.#db.query("SELECT etag, digest, target FROM entries WHERE path = ?");
  }

  /** Undefined where the server is in no cluster, and never was. */
  static open(path: string): IndexReader | undefined {
    return existsSync(path) ? new IndexReader(path) : undefined;
  }

  /** The name of the ledger outside whose member the server was last; undefined for none. */
  get cluster(): string | undefined {
    const query = this.#db.query<{ value: string }, []>("SELECT value FROM facts WHERE name = 'cluster'");
    return query.get()?.value;
  }

  get(path: string): Known | undefined {
    const row = this.#get.get(path);
    return row ? { ...row, target: targetOf(row) } : undefined;
  }

  /** What is to be in a folder, or below it, and is not yet. */
  targetsBelow(folder: string): Record[] {
    const [after, end] = folder === "" ? ["", "\u{10ffff}"] : [`${folder}/`, `${folder}0`];
    const query = this.#db.query<Pick<Row, "target">, [string, string]>(
      "SELECT target FROM entries WHERE open = 1 AND target IS NOT NULL AND path > ? AND path < ?",
    );
    return query.all(after, end).map((row) => targetOf(row)!);
  }

  close(): void {
    this.#db.close();
  }
}

function entryOf(row: Row): Entry {
  const seen = versionOf(row.seen);
  return {
    path: row.path,
    base: row.base,
    etag: row.etag,
    seen,
    known: row.known === null ? seen : versionOf(row.known),
    sent: row.sent === null ? undefined : versionOf(row.sent),
    target: targetOf(row),
    passed: row.passed === null ? [] : JSON.parse(row.passed),
  };
}

function targetOf({ target }: Pick<Row, "target">): Record | undefined {
  return target === null ? undefined : JSON.parse(target);
}

function textOf({ kind, size, mtime, sha256 }: Version): string {
  return JSON.stringify([kind, size, mtime, sha256]);
}

function versionOf(text: string): Version {
  const [kind, size, mtime, sha256] = JSON.parse(text);
  return { kind, size, mtime, sha256 };
}
