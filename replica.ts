/**
 * What a member makes of the ledger's records and of its own tree: `step(state, event)`, with all input and output outside.
 *
 * Of each path a member knows the record that its tree goes back to (`base`, `known`), what the tree holds (`seen`), what it
 * has proposed (`sent`), and a newer record that the tree does not have yet (`target`). An event changes that and returns
 * what is to be done about it. Doing it twice, or never because of a crash, does no harm: `resume` finds all that is open.
 *
 * The rules: the order of the log decides. Where the tree was changed and the log has another change first, the tree's goes
 * aside under a name of its own, as a change like any other. A change beats a deletion. What is the same is no conflict.
 */
import { GONE, hasSameContent, isSame, type Proposal, type Record, type Stretch, type Version } from "./ledger.ts";

export interface Entry {
  path: string;
  /** Revision of the record that the tree goes back to; 0: none. */
  base: number;
  /** What that record says. */
  known: Version;
  /** What the tree holds. */
  seen: Version;
  /** The storage's own name for what it holds, by which it knows what has changed; "" for nothing. */
  etag: string;
  /** Proposed on `base`, and not yet answered. */
  sent: Version | undefined;
  /** Newer than `base`. */
  target: Record | undefined;
  /**
   * sha256 of what was to be placed before `target` took its place, "" for a folder: the tree may hold it all the same, and
   * it is no change.
   */
  passed: string[];
}

/** Where entries are kept; what is not there is a path of which nothing is known. */
export interface Entries {
  get(path: string): Entry | undefined;
  set(entry: Entry): void;
  remove(path: string): void;
  /** All that something is to be done about: proposed, placed or set aside. */
  open(): Iterable<Entry>;
  /** All paths of which there is a record. */
  based(): Iterable<string>;
}

export interface State {
  /** This member. */
  readonly node: string;
  readonly entries: Entries;
  /** All of the log up to here is in the entries. */
  cursor: number;
  /** The ledger can be asked. */
  online: boolean;
  /** Of a snapshot that is coming: how far it has come, and the paths that it has. */
  snapshot: { upTo: number; paths: Set<string> } | undefined;
}

export type Event =
  /** This is what the tree holds. */
  | { kind: "seen"; path: string; version: Version; etag: string }
  /** From the ledger. */
  | ({ kind: "stretch" } & Stretch)
  /** The ledger's answer to a proposal of that version. */
  | { kind: "decided"; path: string; version: Version; revision: number }
  | { kind: "refused"; path: string; version: Version; refusedFor: number }
  /** The tree holds what a record says. */
  | { kind: "placed"; record: Record; etag: string }
  /** The tree keeps what it has against a record: a folder has still something in it, or nobody has the content. */
  | { kind: "kept"; record: Record }
  | { kind: "online" }
  | { kind: "offline" };

export type Effect =
  | ({ kind: "propose" } & Proposal)
  /** Bring the tree to what the record says, if it still holds what `etag` names. */
  | { kind: "place"; record: Record; etag: string }
  /** Give what the tree holds another name, if it is still what `etag` names. */
  | { kind: "aside"; path: string; etag: string; to: string }
  /** A stretch is missing. */
  | { kind: "read"; after: number };

/** Changes `state` by one event, and returns what is to be done. No clock, no file, no network. */
export function step(state: State, event: Event): Effect[] {
  switch (event.kind) {
    case "seen":
      return onSeen(state, event);
    case "stretch":
      return onStretch(state, event);
    case "decided":
    case "refused":
      return onDecision(state, event);
    case "placed":
    case "kept":
      return onPlaced(state, event);
    case "online":
      state.online = true;
      state.snapshot = undefined;
      return [...resume(state), { kind: "read", after: state.cursor }];
    case "offline":
      state.online = false;
      return [];
  }
}

/** All that is open, again: after a start, after a failure, and when the ledger can be asked again. */
export function resume(state: State): Effect[] {
  return [...state.entries.open()].flatMap((entry) => settle(state, entry, "again"));
}

/** Whether what was asked of the tree is still to be done: what came since may have taken its place. */
export function isWanted(state: State, effect: Extract<Effect, { kind: "place" | "aside" }>): boolean {
  const entry = state.entries.get(effect.kind === "place" ? effect.record.path : effect.path);
  const next = entry?.target && nextFor(state, entry);
  if (effect.kind === "aside") return next?.kind === "aside" || next?.kind === "place";
  return next?.kind === "place" && next.record.revision === effect.record.revision;
}

export function isDirty({ seen, known }: Entry): boolean {
  return !isSame(seen, known);
}

/** `NAME.conflict-NODE-TIME.ext`, beside it. */
export function conflictName(path: string, node: string, { mtime }: Version): string {
  const slash = path.lastIndexOf("/") + 1;
  const [folder, name] = [path.slice(0, slash), path.slice(slash)];
  const dot = name.lastIndexOf(".");
  const [stem, extension] = dot > 0 ? [name.slice(0, dot), name.slice(dot)] : [name, ""];
  const time = new Date(mtime / 1000).toISOString().replace(/[-:]|\.\d+/g, "");
  const mark = `.conflict-${node.slice(0, 8)}-${time}${[...extension].slice(0, 20).join("")}`;
  return folder + cut(stem, MAX_NAME_BYTES - Buffer.byteLength(mark)) + mark;
}

const MAX_NAME_BYTES = 240;
/** Versions of a path that are remembered while a newer one is to be placed. */
const MAX_PASSED = 100;

function cut(text: string, bytes: number): string {
  let kept = text;
  while (Buffer.byteLength(kept) > bytes) kept = [...kept].slice(0, -1).join("");
  return kept;
}

function onSeen(state: State, { path, version, etag }: Extract<Event, { kind: "seen" }>): Effect[] {
  const entry = state.entries.get(path) ?? fresh(path);
  const isNews = !isSame(entry.seen, version);
  entry.seen = version;
  entry.etag = etag;
  return settle(state, entry, isNews || entry.target !== undefined ? "next" : undefined);
}

function onStretch(state: State, { after, revision, records, snapshot }: Stretch): Effect[] {
  // One that begins further on has lost something before it, on the way.
  if (snapshot && after === 0) state.snapshot = { upTo: 0, paths: new Set() };
  const reached = snapshot ? state.snapshot?.upTo : state.cursor;
  if (reached === undefined || after > reached) return [{ kind: "read", after: state.cursor }];
  const effects = records.flatMap((record) => onRecord(state, record));
  if (!snapshot) state.cursor = Math.max(state.cursor, revision);
  else state.snapshot!.upTo = Math.max(state.snapshot!.upTo, revision);
  if (snapshot === "complete") effects.push(...onSnapshot(state, revision));
  return effects;
}

function onRecord(state: State, record: Record): Effect[] {
  const { path, revision } = record;
  state.snapshot?.paths.add(path);
  const entry = state.entries.get(path) ?? fresh(path);
  if (revision <= Math.max(entry.base, entry.target?.revision ?? 0)) return [];
  // Our own proposal, whose answer is still on its way or was lost: the tree may have changed since.
  if (entry.sent && isSame(entry.sent, record)) goesBackTo(entry, record, revision);
  else {
    if (entry.target && entry.target.kind !== "gone")
      entry.passed = [...entry.passed, entry.target.sha256].slice(-MAX_PASSED);
    entry.target = record;
    const ours = entry.sent ?? entry.seen;
    // It was made on what we have proposed, or are about to: nothing is lost by it.
    if (ours.kind === "file" && ours.sha256 === record.over) entry.known = ours;
  }
  return settle(state, entry, "next");
}

/** What was known and is not in the log any more was deleted, so long ago that the deletion is forgotten. */
function onSnapshot(state: State, revision: number): Effect[] {
  const mentioned = state.snapshot!.paths;
  state.snapshot = undefined;
  const effects: Effect[] = [];
  for (const path of [...state.entries.based()]) {
    if (mentioned.has(path)) continue;
    effects.push(...onRecord(state, { ...GONE, path, revision, origin: "", over: "" }));
  }
  state.cursor = Math.max(state.cursor, revision);
  return effects;
}

function onDecision(state: State, event: Extract<Event, { kind: "decided" | "refused" }>): Effect[] {
  const entry = state.entries.get(event.path);
  // The answer to a proposal that was made again meanwhile, of another version.
  if (!entry?.sent || !isSame(entry.sent, event.version)) return [];
  if (event.kind === "decided") {
    goesBackTo(entry, event.version, Math.max(entry.base, event.revision));
    return settle(state, entry, "next");
  }
  entry.sent = undefined;
  const isHere = Math.max(entry.base, entry.target?.revision ?? 0) >= event.refusedFor;
  // The record that stands against it is on its way, and will say what is to be done.
  return settle(state, entry, isHere ? "next" : undefined);
}

function onPlaced(state: State, event: Extract<Event, { kind: "placed" | "kept" }>): Effect[] {
  const { record } = event;
  const entry = state.entries.get(record.path) ?? fresh(record.path);
  if (event.kind === "placed") {
    entry.seen = versionOf(record);
    entry.etag = event.etag;
  }
  // What is in a folder is not lost to a file that takes its place.
  if (event.kind === "kept" && record.kind === "file" && entry.seen.kind === "folder")
    return [
      { kind: "aside", path: record.path, etag: entry.etag, to: conflictName(record.path, record.origin, record) },
    ];
  if (record.revision > entry.base) goesBackTo(entry, record, record.revision);
  else if (event.kind === "placed" && record.revision < entry.base) wasLate(entry, record);
  return settle(state, entry, "next");
}

/** What was being placed when something newer needed nothing to be done: that is to be placed now. */
function wasLate(entry: Entry, placed: Record): void {
  const { path, base, known } = entry;
  entry.target ??= { path, revision: base, ...known, origin: "", over: placed.sha256 };
  entry.base = placed.revision;
  entry.known = versionOf(placed);
}

function goesBackTo(entry: Entry, known: Version, base: number): void {
  entry.base = base;
  entry.known = versionOf(known);
  entry.sent = undefined;
  if (entry.target && entry.target.revision > base) return;
  entry.target = undefined;
  entry.passed = [];
}

/**
 * Keeps the entry, and says what is to be done about it next. One proposal of a path is under way at a time: a later change
 * waits for its answer, and so does a record that came before it, since the proposal may be taken after that. `again`: what
 * was under way is lost.
 */
function settle(state: State, entry: Entry, asked: "next" | "again" | undefined): Effect[] {
  resolve(entry);
  const isWaiting = entry.sent !== undefined && asked !== "again";
  const effect = asked && !isWaiting ? nextFor(state, entry) : undefined;
  if (effect?.kind === "propose") entry.sent = effect.version;
  const isNothing = entry.base === 0 && entry.seen.kind === "gone" && !entry.target && !entry.sent;
  if (isNothing) state.entries.remove(entry.path);
  else state.entries.set(entry);
  return effect ? [effect] : [];
}

/** What needs nothing to be done. */
function resolve(entry: Entry): void {
  const { target, seen, sent } = entry;
  if (!target || sent) return;
  if (isPassed(entry, target)) entry.known = seen;
  if (isSame(seen, target)) goesBackTo(entry, target, target.revision);
  // A change beats a deletion: it is proposed on it.
  else if (target.kind === "gone" && isDirty(entry)) goesBackTo(entry, target, target.revision);
}

/** What the tree holds was in the log before `target`. It was placed, and the keeper ended or saw it before it was told so. */
function isPassed({ seen, passed }: Entry, { over }: Record): boolean {
  return seen.kind !== "gone" && (passed.includes(seen.sha256) || (seen.kind === "file" && seen.sha256 === over));
}

function nextFor(state: State, entry: Entry): Effect | undefined {
  const { path, target, seen, sent, etag, base } = entry;
  if (sent || !target) {
    if (!state.online || (!sent && !isDirty(entry))) return undefined;
    // It may be in the log already: what came after it is based on it.
    return { kind: "propose", path, base, version: sent ?? seen };
  }
  // An empty folder is nothing to lose, and a full one does not give way to a file: see `kept`.
  const isLost = isDirty(entry) && seen.kind === "file" && !hasSameContent(seen, target);
  if (isLost) return { kind: "aside", path, etag, to: conflictName(path, state.node, seen) };
  return { kind: "place", record: target, etag };
}

function fresh(path: string): Entry {
  return { path, base: 0, known: GONE, seen: GONE, etag: "", sent: undefined, target: undefined, passed: [] };
}

function versionOf({ kind, size, mtime, sha256 }: Version): Version {
  return { kind, size, mtime, sha256 };
}
