/**
 * A cluster in one process and without a clock: the real `step` of every member and the real rules of the ledger, over
 * links, trees and crashes that are made up from a seed. Run by simulation.test.ts; one seed with all that happens in it:
 *
 * ```sh
 * bun tests/simulation.ts --seed 4711
 * bun tests/simulation.ts --seeds 10000 --from 1
 * ```
 *
 * Four writers change few names through random members, so that conflicts are frequent, while links lose, delay, double and
 * reorder messages, members crash, lose the last writes of their index or all of it, and stay away longer than deletions are
 * kept. Then everything is healed, and when all is quiet the trees are compared, and what became of each content that was
 * ever written. What does the effects of `step` is the simulator's own, and keeps the rules that cluster.ts has to keep.
 */
import { Index } from "../index.ts";
import {
  EmbeddedLedger,
  FOLDER,
  GONE,
  isSame,
  type Proposal,
  type Record,
  type Stretch,
  type Version,
} from "../ledger.ts";
import { conflictName, type Effect, type Event, isDirty, isWanted, resume, type State, step } from "../replica.ts";
import {
  above,
  FORGET_MEMBER_MS,
  JournaledEntries,
  MapEntries,
  MemoryLedger,
  Queue,
  Random,
  type Store,
  Tree,
} from "./world.ts";

export interface Outcome {
  seed: number;
  problems: string[];
  /** How many records the ledger made, conflict copies are left, and steps were taken. */
  records: number;
  copies: number;
  steps: number;
}

/** What one seed is made of. */
interface Plan {
  /** As TCP does: in order and once, or not at all. */
  isOrdered: boolean;
  /** One change at a time, each with all quiet before it. */
  isCalm: boolean;
  hasIndex: boolean;
  hasEmbedded: boolean;
  members: number;
  changes: number;
  span: number;
  faults: number;
  /** Records in a stretch. */
  limit: number;
}

type Up = ({ kind: "propose" } & Proposal) | { kind: "read"; after: number };
type Down = Extract<Event, { kind: "stretch" | "decided" | "refused" }>;
type Place = Extract<Effect, { kind: "place" }>;
type Aside = Extract<Effect, { kind: "aside" }>;

const NAMES = ["a", "b.txt", "d", "d/x", "d/y", "d/e", "d/e/z", "f/w"];
/** Of the time after all is healed: what is not quiet then never will be. */
const MAX_STEPS_TO_QUIET = 20_000;
/** A record whose content nobody has, with everybody there, is given up after so many looks. */
const LOOKS_FOR_CONTENT = 30;
/** The records of what is in a folder, or of a file in the way of one, may come after those that need it. */
const OBSTACLE_LOOKS = 30;

class Node {
  readonly tree = new Tree();
  readonly number: number;
  state: State;
  store: JournaledEntries;
  isUp = true;
  /** Ended by a crash: what was under way in an earlier one is lost. */
  life = 0;
  /** Of the link to the ledger; 0: none. */
  link = 0;
  /** Members of one side reach each other; the ledger is on side 0. */
  side = 0;
  lastUp = 0;
  lastDown = 0;
  lives = 0;

  constructor(number: number, entries: Store) {
    this.number = number;
    this.store = new JournaledEntries(entries);
    this.state = this.#fresh(0);
  }

  get name(): string {
    return this.state.node;
  }

  wipe(entries: Store): void {
    this.store = new JournaledEntries(entries);
    this.lives++;
    this.state = this.#fresh(0);
  }

  restart(): void {
    this.state = this.#fresh(this.state.cursor);
  }

  #fresh(cursor: number): State {
    const node = `n${this.number}x${this.lives}`;
    return { node, entries: this.store, cursor, online: false, snapshot: undefined };
  }
}

export class Simulation {
  readonly #seed: number;
  readonly #random: Random;
  readonly #plan: Plan;
  readonly #queue = new Queue();
  readonly #trace: ((line: string) => void) | undefined;
  readonly #nodes: Node[];
  readonly #ledger: MemoryLedger | EmbeddedLedger;
  readonly #indexes: Index[] = [];
  readonly #feeds = new Map<number, { after: number; isWithinSnapshot: boolean }>();
  readonly #audit = new Audit();
  #links = 0;
  #contents = 0;
  #steps = 0;
  #hasFaults = true;
  /** Proposals of a path that are on their way. */
  readonly #travelling = new Map<string, number>();

  constructor(seed: number, trace?: (line: string) => void) {
    this.#seed = seed;
    this.#random = new Random(seed);
    this.#trace = trace;
    this.#plan = planOf(this.#random);
    this.#ledger = this.#plan.hasEmbedded ? new EmbeddedLedger(":memory:") : new MemoryLedger();
    this.#nodes = Array.from({ length: this.#plan.members + 1 }, (_, number) => new Node(number, this.#entries()));
    this.#trace?.(`seed ${seed} ${JSON.stringify(this.#plan)}`);
  }

  run(): Outcome {
    const { isCalm } = this.#plan;
    for (const node of this.#nodes) this.#fillRoot(node);
    for (const node of this.#nodes) this.#start(node);
    if (isCalm) this.#runCalm();
    else this.#runStorm();
    const problems = this.#heal() ? this.#problems() : [`not quiet after ${MAX_STEPS_TO_QUIET} steps`];
    const copies = [...this.#nodes[0]!.tree.paths.keys()].filter((path) => path.includes(".conflict-"));
    if (isCalm && copies.length > 0) problems.push(`copies without a conflict: ${copies.join(" ")}`);
    for (const index of this.#indexes) index.close();
    this.#ledger.close();
    return { seed: this.#seed, problems, records: this.#ledger.revision, copies: copies.length, steps: this.#steps };
  }

  #runStorm(): void {
    const { span, changes, faults } = this.#plan;
    for (let n = 0; n < changes; n++) this.#queue.after(this.#random.int(0, span), () => this.#change());
    for (let n = 0; n < faults; n++) this.#queue.after(this.#random.int(0, span), () => this.#fault());
    let isOver = false;
    this.#queue.after(span, () => {
      isOver = true;
    });
    while (!isOver) this.#queue.runNext();
  }

  #runCalm(): void {
    for (let n = 0; n < this.#plan.changes; n++) {
      this.#drain();
      if (this.#random.chance(0.2)) this.#absence();
      this.#drain();
      this.#change();
    }
  }

  /** One that is away for some of the others' changes, or comes back. */
  #absence(): void {
    const node = this.#random.pick(this.#nodes.slice(1));
    if (!node.isUp) this.#restart(node);
    else if (this.#random.chance(0.5)) this.#crash(node);
    else this.#breakLink(node, this.#random.int(1, 50));
    if (this.#random.chance(0.3)) this.#prune(true);
  }

  // -------------------------------------------------------------------------------------------- steps

  #entries(): Store {
    if (!this.#plan?.hasIndex) return new MapEntries();
    const index = new Index(":memory:");
    this.#indexes.push(index);
    return Object.assign(index, { paths: () => [...index.below("")].map(({ path }) => path) });
  }

  #say(node: Node | undefined, text: () => string): void {
    this.#trace?.(`${String(this.#queue.now).padStart(6)} ${node?.name ?? "ledger"} ${text()}`);
  }

  #dispatch(node: Node, event: Event): void {
    if (!node.isUp) return;
    this.#steps++;
    node.store.begin(node.state.cursor);
    this.#say(node, () => `< ${describe(event)}`);
    this.#perform(node, step(node.state, event));
  }

  #perform(node: Node, effects: Effect[]): void {
    for (const effect of effects) {
      this.#say(node, () => `  > ${describe(effect)}`);
      if (effect.kind === "propose" || effect.kind === "read") this.#sendUp(node, effect);
      else this.#soon(node, this.#random.int(0, 30), () => this.#touchTree(node, effect, 0));
    }
  }

  /** Unless the member crashes before. */
  #soon(node: Node, delay: number, run: () => void): void {
    const { life } = node;
    this.#queue.after(delay, () => {
      if (node.isUp && node.life === life) run();
    });
  }

  #look(node: Node, path: string): void {
    const content = node.tree.paths.get(path);
    const version = content?.version ?? GONE;
    this.#dispatch(node, { kind: "seen", path, version, etag: content?.etag ?? "" });
  }

  /** All that has changed since it was seen. */
  #scan(node: Node): void {
    const paths = [...new Set([...node.tree.paths.keys(), ...node.store.paths()])];
    for (const path of paths) {
      if (node.tree.etag(path) !== (node.store.get(path)?.etag ?? "")) this.#look(node, path);
    }
  }

  // -------------------------------------------------------------------------------------------- tree

  #touchTree(node: Node, effect: Place | Aside, tries: number): void {
    const { path } = effect.kind === "place" ? effect.record : effect;
    if (!isWanted(node.state, effect)) return;
    if (node.tree.etag(path) !== effect.etag) this.#look(node, path);
    else if (effect.kind === "aside") this.#rename(node, path, effect.to);
    else {
      const counted = this.#isAllKnown(node) ? tries + 1 : 0;
      if (this.#place(node, effect.record, counted)) return;
      this.#soon(node, this.#random.int(10, 60), () => this.#touchTree(node, effect, counted));
    }
  }

  #rename(node: Node, path: string, to: string): void {
    let name = to;
    for (let n = 2; node.tree.kind(name) !== "gone"; n++) name = `${to}-${n}`;
    const touched = node.tree.rename(path, name);
    for (const renamed of touched) {
      const version = node.tree.paths.get(renamed)?.version;
      if (version) this.#audit.wrote(renamed, version);
    }
    for (const renamed of touched) this.#look(node, renamed);
  }

  /** False: to be tried again. */
  #place(node: Node, record: Record, tries: number): boolean {
    const { path, kind } = record;
    if (kind !== "folder" && node.tree.below(path).length > 0) return this.#clearFolder(node, record, tries);
    if (kind === "gone") node.tree.remove(path);
    else if (kind === "file" && !this.#hasContent(node, record)) return this.#giveUp(node, record, tries);
    else {
      // A folder that has a record of its own comes by that.
      if (above(path).some((folder) => node.tree.kind(folder) === "gone" && node.store.get(folder)?.target))
        return false;
      const { made, obstacle } = node.tree.makeAbove(path);
      for (const folder of made) this.#look(node, folder);
      if (obstacle) return this.#avoid(node, record, obstacle, tries);
      node.tree.set(path, this.#asPlaced(record));
    }
    this.#dispatch(node, { kind: "placed", record, etag: node.tree.etag(path) });
    return true;
  }

  /** A time that goes through a double may come out a microsecond off. */
  #asPlaced({ kind, size, mtime, sha256 }: Record): Version {
    return { kind, size, mtime: kind === "file" && this.#random.chance(0.1) ? mtime - 1 : mtime, sha256 };
  }

  /** False while what is in a folder is about to change; one that stays full is kept. */
  #clearFolder(node: Node, record: Record, tries: number): boolean {
    for (const path of node.tree.below(record.path)) {
      const entry = node.store.get(path);
      if (entry?.target) return false;
      if (entry?.etag === node.tree.etag(path)) continue;
      this.#look(node, path);
      return false;
    }
    if (tries < OBSTACLE_LOOKS) return false;
    this.#dispatch(node, { kind: "kept", record });
    return true;
  }

  #hasContent(node: Node, { sha256 }: Record): boolean {
    return this.#nodes.some((other) => this.#canReach(node, other) && other.tree.holds(sha256));
  }

  #canReach(node: Node, other: Node): boolean {
    return node === other || (node.isUp && other.isUp && node.side === other.side);
  }

  /** It can ask everybody, and knows the whole log: what it lacks then is not on its way. */
  #isAllKnown(node: Node): boolean {
    const isUpToDate = node.state.online && node.state.cursor === this.#ledger.revision;
    return isUpToDate && this.#nodes.every((other) => this.#canReach(node, other));
  }

  /** Content that was lost with an index or a disk: the tree keeps what it has. */
  #giveUp(node: Node, record: Record, tries: number): boolean {
    if (tries < LOOKS_FOR_CONTENT) return false;
    this.#dispatch(node, { kind: "kept", record });
    return true;
  }

  /** A file is where a folder of the record's path should be: its bytes go beside that, and its own path is given up. */
  #avoid(node: Node, record: Record, obstacle: string, tries: number): boolean {
    const entry = node.store.get(obstacle);
    if (entry?.etag !== node.tree.etag(obstacle)) this.#look(node, obstacle);
    if (!entry || entry.target || entry.sent || isDirty(entry) || tries < OBSTACLE_LOOKS) return false;
    if (record.kind === "file") {
      const beside = conflictName(obstacle, record.origin, record) + record.path.slice(obstacle.length);
      const { made } = node.tree.makeAbove(beside);
      if (node.tree.kind(beside) === "gone") node.tree.set(beside, this.#asPlaced(record));
      for (const path of [...made, beside]) this.#look(node, path);
    }
    this.#dispatch(node, { kind: "kept", record });
    return true;
  }

  // -------------------------------------------------------------------------------------------- links

  #connect(node: Node): void {
    if (!node.isUp || !this.#nodes[0]!.isUp || node.side !== 0 || node.link !== 0) return;
    node.link = ++this.#links;
    this.#dispatch(node, { kind: "online" });
  }

  #disconnect(node: Node): void {
    if (node.link === 0) return;
    node.link = 0;
    this.#feeds.delete(node.number);
    this.#dispatch(node, { kind: "offline" });
  }

  #breakLink(node: Node, ms: number): void {
    this.#disconnect(node);
    this.#queue.after(ms, () => this.#connect(node));
  }

  get #delay(): number {
    return this.#random.chance(0.03) ? this.#random.int(100, 400) : this.#random.int(1, 20);
  }

  /** How often, and how long from now, a message arrives. */
  #journeys(node: Node): number[] {
    if (this.#plan.isOrdered || node.number === 0 || !this.#hasFaults) return [this.#delay];
    if (this.#random.chance(0.03)) {
      // The other side misses something after a while.
      this.#queue.after(this.#random.int(50, 300), () => this.#breakLink(node, this.#random.int(1, 50)));
      return [];
    }
    return this.#random.chance(0.06) ? [this.#delay, this.#delay] : [this.#delay];
  }

  #sendUp(node: Node, message: Up): void {
    const { link } = node;
    if (link === 0) return;
    const revision = node.state.cursor;
    const { name } = node;
    for (const journey of this.#journeys(node)) {
      const at = this.#plan.isOrdered ? Math.max(node.lastUp, this.#queue.now + journey) : this.#queue.now + journey;
      node.lastUp = at;
      this.#count(message, 1);
      this.#queue.after(at - this.#queue.now, () => {
        this.#count(message, -1);
        // What was sent before a break may still be read after it, until there is another link.
        const isRead = node.link === link || !this.#plan.isOrdered || (node.link === 0 && this.#random.chance(0.5));
        if (this.#nodes[0]!.isUp && isRead) this.#receive(node, name, revision, message);
      });
    }
  }

  #count(message: Up, by: number): void {
    if (message.kind !== "propose") return;
    this.#travelling.set(message.path, (this.#travelling.get(message.path) ?? 0) + by);
  }

  #sendDown(node: Node, message: Down): void {
    const { link } = node;
    if (link === 0) return;
    for (const journey of this.#journeys(node)) {
      const at = this.#plan.isOrdered ? Math.max(node.lastDown, this.#queue.now + journey) : this.#queue.now + journey;
      node.lastDown = at;
      this.#queue.after(at - this.#queue.now, () => {
        if (!this.#plan.isOrdered || node.link === link) this.#dispatch(node, message);
      });
    }
  }

  // -------------------------------------------------------------------------------------------- ledger

  #receive(node: Node, name: string, revision: number, message: Up): void {
    this.#ledger.join({ node: name, address: name, revision }, this.#queue.now);
    if (message.kind === "read") {
      this.#feeds.set(node.number, { after: message.after, isWithinSnapshot: false });
      this.#feed(node, true);
    } else this.#append(node, name, message);
  }

  #append(node: Node, name: string, { path, base, version }: Proposal): void {
    const { decisions, records } = this.#ledger.append(name, [{ path, base, version }]);
    for (const record of records) this.#say(undefined, () => `record ${describeRecord(record)} by ${name}`);
    const decision = decisions[0]!;
    const answer: Down =
      "revision" in decision
        ? { kind: "decided", path, version, revision: decision.revision }
        : { kind: "refused", path, version, refusedFor: decision.refusedFor };
    const isAnswerFirst = this.#random.chance(0.5);
    if (isAnswerFirst) this.#sendDown(node, answer);
    if (records.length > 0) for (const other of this.#nodes) this.#feed(other, false);
    if (!isAnswerFirst) this.#sendDown(node, answer);
  }

  /** Sends what is newer than what was sent last. Parts of a snapshot come one by one, and others' changes between. */
  #feed(node: Node, isAsked: boolean): void {
    const feed = this.#feeds.get(node.number);
    if (!feed || (feed.isWithinSnapshot && !isAsked)) return;
    let isDue = isAsked || feed.after < this.#ledger.revision;
    while (isDue) {
      const stretch: Stretch = this.#ledger.read(feed.after, this.#plan.limit, feed.isWithinSnapshot);
      this.#sendDown(node, { kind: "stretch", ...stretch });
      feed.after = stretch.revision;
      feed.isWithinSnapshot = stretch.snapshot === "part";
      if (feed.isWithinSnapshot) {
        this.#queue.after(this.#random.int(0, 40), () => {
          if (this.#feeds.get(node.number) === feed) this.#feed(node, true);
        });
        return;
      }
      isDue = feed.after < this.#ledger.revision;
    }
  }

  #prune(isLongAway: boolean): void {
    const { now } = this.#queue;
    for (const { number, name, link, isUp } of this.#nodes) {
      const isThere = isUp && (link !== 0 || number === 0);
      // What it has said last may be older.
      const noted = this.#ledger.members().find((member) => member.node === name)?.revision;
      if (isThere) this.#ledger.join({ node: name, address: name, revision: noted ?? 0 }, now + FORGET_MEMBER_MS);
    }
    this.#ledger.prune(this.#nodes[0]!.state.cursor, isLongAway ? now + 1 + FORGET_MEMBER_MS : now);
    this.#say(undefined, () => `pruned${isLongAway ? ", and members forgotten" : ""}`);
  }

  // -------------------------------------------------------------------------------------------- faults

  #fault(): void {
    const node = this.#random.pick(this.#nodes);
    const kind = this.#random.weighted({ crash: 4, cut: 3, partition: 2, prune: 3, wipe: 0.4 });
    this.#say(node, () => `FAULT ${kind}`);
    if (kind === "crash" || kind === "wipe") {
      this.#crash(node);
      if (kind === "wipe") this.#wipe(node);
      else if (this.#random.chance(0.4)) this.#losePower(node);
      this.#queue.after(this.#random.int(1, 600), () => this.#restart(node));
    } else if (kind === "cut") this.#breakLink(node, this.#random.int(1, 300));
    else if (kind === "partition") this.#partition(node);
    else this.#prune(this.#random.chance(0.5));
  }

  #crash(node: Node): void {
    this.#say(node, () => "crashes");
    if (node.number === 0) for (const other of this.#nodes) this.#disconnect(other);
    node.isUp = false;
    node.life++;
    node.link = 0;
    this.#feeds.delete(node.number);
  }

  #losePower(node: Node): void {
    const steps = this.#random.int(1, 6);
    // It may hold what it does not know to be old, or have deleted what it does not know to be gone.
    const isOpen = (path: string) => this.#ledger.newest(path)?.kind === "file";
    this.#audit.forgive(({ by, path }) => node.tree.kind(path) === "file" || (by === node.number && isOpen(path)));
    this.#say(node, () => `loses ${steps} steps`);
    node.state.cursor = node.store.lose(steps) ?? node.state.cursor;
  }

  #wipe(node: Node): void {
    this.#audit.forgive(() => true);
    node.wipe(this.#entries());
    this.#say(node, () => "has no index");
  }

  #restart(node: Node): void {
    if (node.isUp) return;
    node.isUp = true;
    node.restart();
    this.#start(node);
    if (node.number === 0)
      for (const other of this.#nodes) this.#soon(other, this.#random.int(1, 50), () => this.#connect(other));
  }

  #start(node: Node): void {
    this.#say(node, () => "starts");
    this.#scan(node);
    this.#perform(node, resume(node.state));
    this.#soon(node, this.#random.int(1, 30), () => this.#connect(node));
  }

  #partition(node: Node): void {
    if (node.number === 0) return;
    node.side = this.#random.int(1, 2);
    this.#disconnect(node);
    this.#queue.after(this.#random.int(100, 800), () => this.#join(node));
  }

  #join(node: Node): void {
    node.side = 0;
    this.#connect(node);
  }

  // -------------------------------------------------------------------------------------------- writers

  /** A root that has something in it before the server first starts. */
  #fillRoot(node: Node): void {
    if (this.#random.chance(0.7)) return;
    const path = this.#random.pick(NAMES);
    const version = this.#plan.isCalm
      ? this.#newFile(String(node.number))
      : this.#newFile(`root${this.#random.int(1, 2)}`);
    if (this.#plan.isCalm && node.number > 0) return;
    node.tree.makeAbove(path);
    node.tree.set(path, version);
    this.#audit.wrote(path, version);
  }

  #newFile(sha256 = `c${++this.#contents}`): Version {
    return { kind: "file", size: 1, mtime: this.#newTime(), sha256 };
  }

  #newTime(): number {
    return 1_700_000_000_000_000 + (this.#contents * 1000 + this.#random.int(0, 900)) * 1_000_000;
  }

  #change(): void {
    const node = this.#random.pick(this.#plan.isCalm ? this.#nodes.filter(({ isUp }) => isUp) : this.#nodes);
    const known = [...node.tree.paths.keys()];
    const path = this.#random.chance(0.6) || known.length === 0 ? this.#random.pick(NAMES) : this.#random.pick(known);
    const touched = this.#changeTree(node, path);
    if (touched.length === 0) return;
    this.#say(
      node,
      () =>
        `WRITES ${touched.map((name) => `${name}=${describeVersion(node.tree.paths.get(name)?.version ?? GONE)}`).join(" ")}`,
    );
    const isClient = node.isUp && (this.#plan.isCalm || this.#random.chance(0.6));
    if (isClient) for (const name of touched) this.#look(node, name);
    // Another program's: its events may come late, and in any order, or are lost with a crash.
    else for (const name of touched) this.#soon(node, this.#random.int(1, 200), () => this.#look(node, name));
  }

  /** Which paths were touched. */
  #changeTree(node: Node, path: string): string[] {
    const kind = node.tree.kind(path);
    const what = this.#random.weighted({ put: 40, touch: 8, remove: 22, move: 10, copy: 5, mkdir: 8, swap: 8 });
    if (what === "put" && kind !== "folder") return this.#put(node, path, this.#newFile());
    if (what === "touch" && kind === "file") {
      return this.#put(node, path, { ...node.tree.paths.get(path)!.version, mtime: this.#newTime() });
    }
    if (what === "remove" && kind !== "gone") return this.#remove(node, path);
    if ((what === "move" || what === "copy") && kind === "file") return this.#move(node, path, what === "move");
    if (what === "mkdir" && kind === "gone") return this.#makeFolder(node, path);
    if (what !== "swap" || kind === "gone") return [];
    const removed = this.#remove(node, path);
    return [...removed, ...(kind === "file" ? this.#makeFolder(node, path) : this.#put(node, path, this.#newFile()))];
  }

  #put(node: Node, path: string, version: Version): string[] {
    const { made, obstacle } = node.tree.makeAbove(path);
    if (obstacle) return made;
    this.#drop(node, path, version);
    node.tree.set(path, version);
    this.#audit.wrote(path, version);
    return [...made, path];
  }

  #makeFolder(node: Node, path: string): string[] {
    const { made, obstacle } = node.tree.makeAbove(path);
    if (obstacle) return made;
    node.tree.set(path, FOLDER);
    this.#audit.wrote(path, FOLDER);
    return [...made, path];
  }

  #remove(node: Node, path: string): string[] {
    const removed = [...node.tree.below(path), path].reverse();
    for (const name of removed) this.#drop(node, name, GONE);
    return removed;
  }

  #move(node: Node, path: string, isMove: boolean): string[] {
    const to = this.#random.pick(NAMES);
    const { version } = node.tree.paths.get(path)!;
    if (to === path || node.tree.kind(to) === "folder" || above(to).includes(path)) return [];
    const put = this.#put(node, to, version);
    if (!put.includes(to)) return put;
    return isMove ? [...put, ...this.#remove(node, path)] : put;
  }

  /** Whoever takes a file's place held it. */
  #drop(node: Node, path: string, next: Version): void {
    const content = node.tree.paths.get(path);
    if (content?.version.kind === "file" && content.version.sha256 !== next.sha256) {
      this.#audit.dropped(path, content.version);
      if (next.kind === "gone" && this.#isUncontested(node, path)) this.#audit.removedForGood(path, node.number);
    }
    if (next.kind === "gone") node.tree.remove(path);
  }

  /** It is the newest that the ledger has, and nobody has anything else that is not known yet. */
  #isUncontested(node: Node, path: string): boolean {
    if (!this.#plan.isOrdered || (this.#travelling.get(path) ?? 0) > 0) return false;
    const current = this.#ledger.newest(path);
    const { version } = node.tree.paths.get(path)!;
    if (!current || !isSame(current, version) || node.store.get(path)?.base !== current.revision) return false;
    return this.#nodes.every((other) => {
      const entry = other.store.get(path);
      const isNoticed = other.tree.etag(path) === (entry?.etag ?? "");
      return isNoticed && !entry?.sent && (!entry || !isDirty(entry) || isSame(entry.seen, version));
    });
  }

  // -------------------------------------------------------------------------------------------- the end

  /** All that happens until nothing is left; false if that never comes. */
  #drain(): boolean {
    const end = this.#steps + MAX_STEPS_TO_QUIET;
    for (let n = 0; this.#queue.runNext(); n++) {
      if (this.#steps > end || n > 10 * MAX_STEPS_TO_QUIET) return false;
    }
    return true;
  }

  #heal(): boolean {
    this.#say(undefined, () => "ALL IS HEALED");
    this.#hasFaults = false;
    this.#restart(this.#nodes[0]!);
    for (const node of this.#nodes) {
      node.side = 0;
      if (!node.isUp) this.#restart(node);
      else this.#scan(node);
      if (!this.#plan.isOrdered) this.#disconnect(node);
      this.#connect(node);
    }
    return this.#drain();
  }

  #problems(): string[] {
    const records = this.#ledger.records(0, 1_000_000).filter(({ kind }) => kind !== "gone");
    const wanted = new Map<string, Version>(records.map((record) => [record.path, record]));
    const problems = this.#nodes.flatMap((node) => this.#differences(node, wanted));
    return [...problems, ...this.#audit.problems(this.#nodes[0]!.tree)];
  }

  #differences(node: Node, wanted: Map<string, Version>): string[] {
    const problems: string[] = [];
    for (const path of new Set([...wanted.keys(), ...node.tree.paths.keys()])) {
      const [here, there] = [node.tree.paths.get(path)?.version ?? GONE, wanted.get(path) ?? GONE];
      if (isSame(here, there)) continue;
      problems.push(`${node.name} has ${path}=${describeVersion(here)}, the ledger ${describeVersion(there)}`);
    }
    for (const entry of node.store.open()) {
      if (entry.target || entry.sent || isDirty(entry)) problems.push(`${node.name} has ${entry.path} open`);
    }
    if (node.state.cursor !== this.#ledger.revision) problems.push(`${node.name} is at ${node.state.cursor}`);
    return problems;
  }
}

function planOf(random: Random): Plan {
  const isCalm = random.chance(0.15);
  return {
    isCalm,
    isOrdered: isCalm || random.chance(0.6),
    hasIndex: random.chance(0.02),
    hasEmbedded: random.chance(0.05),
    members: random.int(2, 4),
    changes: random.int(5, 50),
    span: random.int(300, 4000),
    faults: random.chance(0.1) ? 0 : random.int(1, 12),
    limit: random.pick([1, 2, 3, 5, 100]),
  };
}

// ---------------------------------------------------------------------------------------------------- audit

/** What was written, and what became of it. A content counts under its first name: a conflict copy's is another of it. */
class Audit {
  readonly #written = new Set<string>();
  readonly #dropped = new Set<string>();
  readonly #removed = new Map<string, number>();

  wrote(path: string, version: Version): void {
    this.#removed.delete(path);
    if (version.kind === "file") this.#written.add(keyOf(path, version));
  }

  /** By somebody who held it. */
  dropped(path: string, version: Version): void {
    this.#dropped.add(keyOf(path, version));
  }

  /** Nobody had anything newer at that time. */
  removedForGood(path: string, by: number): void {
    this.#removed.set(path, by);
  }

  /** Who has lost the index, or the end of it, does not know any more what was deleted. */
  forgive(isForgiven: (removal: { path: string; by: number }) => boolean): void {
    for (const [path, by] of this.#removed) if (isForgiven({ path, by })) this.#removed.delete(path);
  }

  problems(tree: Tree): string[] {
    const files = [...tree.paths].filter(([, { version }]) => version.kind === "file");
    const held = new Set(files.map(([path, { version }]) => keyOf(path, version)));
    const lost = [...this.#written].filter((key) => !held.has(key) && !this.#dropped.has(key));
    const risen = [...this.#removed.keys()].filter((path) => tree.kind(path) === "file");
    return [...lost.map((key) => `lost ${key}`), ...risen.map((path) => `back from deletion: ${path}`)];
  }
}

function keyOf(path: string, { sha256 }: Version): string {
  return `${path.replace(/\.conflict-[\w-]*/g, "").replace(/-\d+(?=\/|$)/g, "")} ${sha256}`;
}

// ---------------------------------------------------------------------------------------------------- trace

function describeVersion({ kind, sha256, mtime }: Version): string {
  return kind === "file" ? `${sha256}@${mtime / 1_000_000 - 1_700_000_000}` : kind;
}

function describeRecord(record: Record): string {
  return `${record.revision}:${record.path}=${describeVersion(record)}${record.over ? ` over ${record.over}` : ""}`;
}

function describe(it: Event | Effect): string {
  switch (it.kind) {
    case "stretch":
      return `stretch ${it.snapshot ?? ""} after ${it.after} to ${it.revision}: ${it.records.map(describeRecord).join(" ")}`;
    case "seen":
      return `seen ${it.path}=${describeVersion(it.version)} ${it.etag}`;
    case "decided":
      return `decided ${it.path}=${describeVersion(it.version)} ${it.revision}`;
    case "refused":
      return `refused ${it.path}=${describeVersion(it.version)} for ${it.refusedFor}`;
    case "placed":
    case "kept":
    case "place":
      return `${it.kind} ${describeRecord(it.record)}`;
    case "propose":
      return `propose ${it.path}=${describeVersion(it.version)} on ${it.base}`;
    case "aside":
      return `aside ${it.path} to ${it.to}`;
    case "read":
      return `read after ${it.after}`;
    default:
      return it.kind;
  }
}

/** What a seed comes to. */
export function simulate(seed: number, trace?: (line: string) => void): Outcome {
  return new Simulation(seed, trace).run();
}

function main(args: string[]): void {
  const option = (name: string) => Number(args[args.indexOf(name) + 1] ?? Number.NaN);
  if (args.includes("--seed")) {
    const outcome = simulate(option("--seed"), console.log);
    console.log(outcome);
    process.exit(outcome.problems.length > 0 ? 1 : 0);
  }
  const from = args.includes("--from") ? option("--from") : 1;
  let failures = 0;
  for (let seed = from; seed < from + option("--seeds"); seed++) {
    const { problems } = simulate(seed);
    if (problems.length > 0 && ++failures <= 20) console.log(`seed ${seed}: ${problems.slice(0, 3).join("; ")}`);
  }
  console.log(`${failures} of ${option("--seeds")} seeds failed`);
  process.exit(failures > 0 ? 1 : 0);
}

if (import.meta.main) main(process.argv.slice(2));
