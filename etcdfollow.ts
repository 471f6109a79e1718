/**
 * The ledger in etcd as it goes on: one watch of all that a cluster keeps there, begun again at another endpoint whenever it
 * ends, or has gone silent. In order, without a gap, and from where it was.
 *
 * A watch alone does not know whether it is heard: a member of etcd that is cut off from the others keeps one open and has
 * nothing to say. So it is begun by a read that needs the others' consent, and each member of the cluster beats: silence is
 * the end of it. Where etcd has forgotten the history, or where there is too much of it, all records are read instead, at
 * one revision, as a snapshot.
 */
import { sleep } from "./connection.ts";
import {
  type Etcd,
  encoded,
  endOf,
  get,
  getAll,
  type KeyValue,
  type RangeAnswer,
  type TxnAnswer,
  unreachable,
  type Watched,
} from "./etcd.ts";
import { behind, countIn, isCount, type Keys, keyIn, objectIn, revisionOf } from "./etcdkeys.ts";
import type { Record, Stretch } from "./ledger.ts";
import { LEASE_MS } from "./link.ts";
import { RepriseError } from "./protocol.ts";

/** A watch on which nothing came for so long is begun again elsewhere: a beat or two may be late. */
const SILENCE_MS = 3_000;
/** While history comes, which etcd may take long to collect: from that limit up to this one, each time nothing has come. */
const MAX_SILENCE_MS = 60_000;
const CHECK_MS = 250;
/** Records in one answer, which may have 4 MiB. */
export const PIECE = 500;
/**
 * Revisions that are followed one by one before all records are read instead: two hours of three members' beats. etcd
 * takes three times as long for a change of long ago as for a record of a snapshot.
 */
const MAX_REPLAYED = 20_000;
const FIRST_PAUSE_MS = 50;
const LAST_PAUSE_MS = 1_000;

/** What a member says of itself. */
export interface LiveMember {
  address: string;
  /** It knows the log up to here. */
  known: number;
  /** And its tree has it. */
  revision: number;
  /** Clients may be sent there. */
  live: boolean;
  /** Members below it. */
  nodes?: string[] | undefined;
  problem?: string | undefined;
  /** It has no files, and only sends clients on: what somebody misses it cannot have. */
  redirectOnly?: boolean | undefined;
}

/** What the log and the members have become, in the order in which it happened. */
export interface Following {
  onStretch(stretch: Stretch): void;
  /** `isCurrent`: nothing of the log that was there before them is still to be given. */
  onMembers(members: Map<string, LiveMember>, isCurrent: boolean): void;
  /** A member has said something, be it what it had said before. */
  onBeat?(node: string): void;
  /** All that the log held when the watch was begun has been given: once for each time. */
  onCurrent(revision: number): void;
  /** Neither what others do nor that this one is there gets through any more. */
  onLost(error: RepriseError): void;
  onBack(): void;
  /** The log is another; nothing more comes until it is followed from 0 on. */
  onRenewed(id: string): void;
}

interface FollowerOptions {
  etcd: Etcd;
  keys: Keys;
  following: Following;
  after: number;
  last: Pick<Record, "path" | "revision"> | undefined;
  id: string;
  /** See `Beats`. */
  beats: { readonly leasedAt: number | undefined };
  read: (kvs: KeyValue[]) => Record[];
  hear: (revision: number) => void;
  setPruned: (pruned: number) => void;
  /** Make the log that somebody has removed; return its id. */
  reopen: () => Promise<string>;
  renew: () => Promise<string>;
}

/** One watch of all keys, begun again whenever it ends. */
export class Follower {
  readonly #options: FollowerOptions;
  readonly #stopped = new AbortController();
  /** Of the watch, or of what comes before it. */
  #attempt = new AbortController();
  /** The end of the last stretch. */
  #cursor: number;
  /** Of etcd: all that came up to here has been given. */
  #position: number;
  #last: Pick<Record, "path" | "revision"> | undefined;
  #needsSnapshot: boolean;
  #members = new Map<string, LiveMember>();
  #shownMembers = "";
  /** Of a revision whose end has not come yet. */
  #held: KeyValue[] = [];
  #heardAt = performance.now();
  /** For the history. */
  #silenceMs = SILENCE_MS;
  #endpoint = 0;
  /** Linearizable reads are answered, and the watch is begun. */
  #hasBegun = false;
  #isCurrent = false;
  #isLost = false;
  #problem: RepriseError | undefined;

  constructor(options: FollowerOptions) {
    this.#options = options;
    this.#cursor = options.after;
    this.#position = options.after;
    this.#last = options.last;
    this.#needsSnapshot = options.after === 0;
  }

  stop(): void {
    const error = new RepriseError("interrupted");
    this.#stopped.abort(error);
    this.#attempt.abort(error);
  }

  async run(): Promise<void> {
    const timer = setInterval(() => this.#check(), CHECK_MS);
    const failures = new Map<string, RepriseError>();
    try {
      for (let round = 0; !this.#isStopped; ) {
        const endpoint = this.#options.etcd.endpoints[this.#endpoint]!;
        const error = await this.#try(endpoint);
        if (this.#isStopped) return;
        if (this.#hasBegun) {
          failures.clear();
          round = 0;
        }
        failures.set(endpoint, error);
        this.#endpoint = (this.#endpoint + 1) % this.#options.etcd.endpoints.length;
        let ms = FIRST_PAUSE_MS;
        if (failures.size === this.#options.etcd.endpoints.length) {
          this.#problem = unreachable(failures);
          if (!this.#hasBegun) this.#lose(this.#problem);
          failures.clear();
          ms = Math.min(LAST_PAUSE_MS, FIRST_PAUSE_MS * 2 ** round++);
        }
        await sleep(ms * (0.75 + Math.random() / 2), this.#stopped.signal).catch(() => {});
      }
    } finally {
      clearInterval(timer);
    }
  }

  async #try(endpoint: string): Promise<RepriseError> {
    this.#attempt = new AbortController();
    this.#hasBegun = false;
    try {
      return await this.#follow(endpoint, this.#attempt.signal);
    } catch (error) {
      if (this.#isStopped) return new RepriseError("interrupted");
      if (!(error instanceof RepriseError)) throw error;
      return error;
    }
  }

  get #isStopped(): boolean {
    return this.#stopped.signal.aborted;
  }

  /** Ends a watch that has gone silent, and says so when it stays so. */
  #check(): void {
    const now = performance.now();
    const { leasedAt } = this.#options.beats;
    const limit = this.#isCurrent ? SILENCE_MS : this.#silenceMs;
    const silent = new RepriseError("busy", `nothing was heard for ${limit / 1000} s`);
    if (this.#hasBegun && now - this.#heardAt > limit && !this.#attempt.signal.aborted) {
      if (!this.#isCurrent) this.#silenceMs = Math.min(this.#silenceMs * 2, MAX_SILENCE_MS);
      this.#attempt.abort(silent);
    }
    const isHeard = now - this.#heardAt <= Math.max(LEASE_MS, limit);
    const isLeased = leasedAt === undefined || now - leasedAt <= LEASE_MS;
    if (!isHeard || !isLeased) this.#lose(this.#problem ?? silent);
    else if (this.#hasBegun) this.#return();
  }

  #lose(error: RepriseError): void {
    if (this.#isLost || this.#isStopped) return;
    this.#isLost = true;
    this.#options.following.onLost(error);
  }

  #return(): void {
    if (!this.#isLost || this.#isStopped) return;
    this.#isLost = false;
    this.#options.following.onBack();
  }

  #renewed(id: string): void {
    if (this.#isStopped) return;
    this.stop();
    this.#options.following.onRenewed(id);
  }

  async #follow(endpoint: string, signal: AbortSignal): Promise<RepriseError> {
    const { etcd, keys } = this.#options;
    this.#isCurrent = false;
    const upTo = await this.#begin(endpoint, signal);
    if (upTo === undefined) return new RepriseError("interrupted");
    this.#hear();
    this.#hasBegun = true;
    this.#problem = undefined;
    this.#check();
    if (this.#needsSnapshot || upTo - this.#position > MAX_REPLAYED) await this.#readAll(upTo, signal);
    this.#tellCurrent(upTo);
    this.#held = [];
    const create = {
      key: encoded(keys.all),
      range_end: endOf(keys.all),
      start_revision: String(this.#position + 1),
      fragment: true,
      progress_notify: true,
    };
    for await (const watched of etcd.watch(endpoint, create, { signal, onBytes: this.#hear })) {
      if (this.#isStopped) break;
      this.#hear();
      if (watched.canceled) return this.#onCanceled(watched);
      if (!watched.created) this.#onEvents(watched, upTo);
      this.#tellCurrent(upTo);
    }
    return new RepriseError("interrupted");
  }

  readonly #hear = (): void => {
    this.#heardAt = performance.now();
  };

  #tellCurrent(upTo: number): void {
    if (this.#isCurrent || this.#position < upTo || this.#isStopped) return;
    this.#isCurrent = true;
    this.#silenceMs = SILENCE_MS;
    this.#options.following.onCurrent(this.#cursor);
  }

  #onCanceled({ compact_revision, cancel_reason }: Watched): RepriseError {
    if (Number(compact_revision ?? 0) > 0) this.#needsSnapshot = true;
    return new RepriseError("busy", cancel_reason || "the watch was cancelled");
  }

  /**
   * What only an endpoint that has the others' consent can say. Returns etcd's revision, or undefined where the log is
   * another.
   */
  async #begin(endpoint: string, signal: AbortSignal): Promise<number | undefined> {
    const { etcd, keys, id, setPruned } = this.#options;
    const last = this.#last ? [get(keys.recordOf(this.#last.path))] : [];
    const body = { success: [get(keys.ledger), get(keys.pruned), getAll(keys.members), ...last] };
    const { header, responses } = await etcd.callAt<TxnAnswer>(endpoint, "/v3/kv/txn", body, signal);
    const [ledger, pruned, members, newest] = responses!.map(({ response_range }) => response_range?.kvs ?? []);
    const upTo = Number(header.revision);
    const forgotten = countIn(pruned![0]);
    if (!ledger![0] || objectIn(ledger![0])?.id !== id) return void (await this.#reopen());
    if (upTo < this.#position || this.#isMissing(newest?.[0], forgotten)) {
      this.#renewed(await this.#options.renew());
      return undefined;
    }
    setPruned(forgotten);
    this.#members = new Map();
    for (const kv of members!) this.#setMember(kv);
    this.#showMembers();
    return upTo;
  }

  async #reopen(): Promise<void> {
    const id = await this.#options.reopen();
    if (id !== this.#options.id) this.#renewed(id);
  }

  /** Where the newest record that is known is there, or was forgotten, or something newer, all before it is, too. */
  #isMissing(newest: KeyValue | undefined, pruned: number): boolean {
    if (!this.#last) return false;
    return revisionOf(newest) < this.#last.revision && (newest !== undefined || pruned < this.#last.revision);
  }

  /** In the order of their keys, which costs etcd least, as all of them are of one revision. */
  async #readAll(revision: number, signal: AbortSignal): Promise<void> {
    const { keys, read, following } = this.#options;
    let newest = 0;
    for (let [key, part] = [encoded(keys.records), 0]; ; part++) {
      const { kvs = [], more = false } = await this.#pieceFrom(key, revision, signal);
      this.#hear();
      if (this.#isStopped) return;
      const records = read(kvs);
      for (const { path, revision } of records) {
        if (revision <= newest) continue;
        newest = revision;
        this.#last = { path, revision };
      }
      if (more) following.onStretch({ after: part, revision: part + 1, records, snapshot: "part" });
      else {
        this.#cursor = Math.max(newest, part);
        this.#position = revision;
        this.#needsSnapshot = false;
        this.#options.hear(newest);
        return following.onStretch({ after: part, revision: this.#cursor, records, snapshot: "complete" });
      }
      key = behind(kvs.at(-1)!);
    }
  }

  /** Records from that key on, as many as come in one answer: what others have put among them may be large. */
  async #pieceFrom(key: string, revision: number, signal: AbortSignal): Promise<RangeAnswer> {
    const { etcd, keys } = this.#options;
    for (let limit = PIECE; ; limit = Math.ceil(limit / 4)) {
      const body = { key, range_end: endOf(keys.records), limit: String(limit), revision: String(revision) };
      try {
        // Whichever endpoint answers: all have that revision.
        return await etcd.range(body, signal);
      } catch (error) {
        if (limit === 1 || !(error instanceof RepriseError && error.code === "too_large")) throw error;
      }
    }
  }

  #onEvents({ events = [], fragment = false, header }: Watched, upTo: number): void {
    const { keys, following, hear } = this.#options;
    const newest = Number(events.at(-1)?.kv.mod_revision ?? 0);
    for (const { type, kv } of events) {
      const key = keyIn(kv) ?? "";
      if (key.startsWith(keys.records)) {
        if (type !== "DELETE" && Number(kv.mod_revision) > this.#cursor) this.#held.push(kv);
      } else if (Number(kv.mod_revision) > upTo) this.#onFact(key, type, kv);
      if (this.#isStopped) return;
    }
    const isWhole = ({ mod_revision }: KeyValue) => !fragment || Number(mod_revision) < newest;
    const whole = this.#held.filter(isWhole);
    this.#held = this.#held.filter((kv) => !isWhole(kv));
    if (whole.length > 0) {
      const [after, revision] = [this.#cursor, Number(whole.at(-1)!.mod_revision)];
      const records = this.#options.read(whole);
      this.#cursor = revision;
      this.#last = records.at(-1) ?? this.#last;
      hear(revision);
      // Whoever has become live before a record is told of before it: it is waited for.
      this.#showMembers();
      following.onStretch({ after, revision, records });
    }
    this.#position = Math.max(
      this.#position,
      events.length > 0 ? newest - (fragment ? 1 : 0) : Number(header?.revision ?? 0),
    );
    this.#showMembers();
  }

  /** What is newer than what the watch began with. */
  #onFact(key: string, type: "DELETE" | undefined, kv: KeyValue): void {
    const { keys, id, setPruned } = this.#options;
    if (key.startsWith(keys.members)) {
      const node = key.slice(keys.members.length);
      if (type === "DELETE") this.#members.delete(node);
      else this.#setMember(kv);
      this.#options.following.onBeat?.(node);
    } else if (key === keys.pruned && type !== "DELETE") setPruned(countIn(kv));
    // What has become of it is asked of etcd, at the next beginning.
    else if (key === keys.ledger && (type === "DELETE" || objectIn(kv)?.id !== id))
      this.#attempt.abort(new RepriseError("busy", "the log of the cluster has begun anew"));
  }

  #setMember(kv: KeyValue): void {
    const said = objectIn(kv);
    const node = keyIn(kv)?.slice(this.#options.keys.members.length);
    if (!node || typeof said?.address !== "string" || !isCount(said.known) || !isCount(said.revision)) return;
    // Revisions of another log mean nothing.
    const isOfThis = said.ledger === this.#options.id;
    this.#members.set(node, {
      address: said.address,
      known: isOfThis ? said.known : 0,
      revision: isOfThis ? said.revision : 0,
      live: isOfThis && said.live === true,
      nodes: Array.isArray(said.nodes) ? said.nodes.filter((node) => typeof node === "string") : [],
      problem: typeof said.problem === "string" ? said.problem : undefined,
      redirectOnly: said.redirectOnly === true || undefined,
    });
  }

  #showMembers(): void {
    const shown = JSON.stringify([...this.#members]);
    if (this.#isStopped || shown === this.#shownMembers) return;
    this.#shownMembers = shown;
    this.#options.following.onMembers(new Map(this.#members), this.#isCurrent);
  }
}
