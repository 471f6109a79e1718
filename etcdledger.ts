/**
 * The ledger in etcd, where every member of a cluster reads it and none is the master.
 *
 * Beneath `/reprise/NAME/`:
 *
 *     ledger         {version, id, store}; written once, and again when the log begins anew
 *     secret         by which members know each other
 *     records/PATH   the newest record of a path; its revision is the key's `mod_revision`
 *     gone/PATH      written along with the record of a deletion: what is to be forgotten some day
 *     pruned         deletions up to here are forgotten
 *     members/NODE   what a member says of itself each second, under a lease: it goes with the member
 *     seen/NODE      who was there, when, and how far it had come
 *
 * A change is a transaction that compares the revision of each path it is based on, and the ledger's. It may have been
 * carried out though no answer came: proposed again, it is found to be the same. All of the keys are followed by one watch,
 * and since each member beats, silence means that it is dead. Where the watch cannot begin since etcd has forgotten the
 * history, or where there is too much of it, all records are read, as a snapshot.
 */
import { randomBytes, randomUUID } from "node:crypto";
import {
  type Etcd,
  encoded,
  endOf,
  get,
  type KeyValue,
  type Operation,
  put,
  type RangeAnswer,
  remove,
  removeAll,
  unchanged,
} from "./etcd.ts";
import { Follower, type Following, type LiveMember, PIECE } from "./etcdfollow.ts";
import {
  behind,
  countIn,
  inOrder,
  isCount,
  Keys,
  keyIn,
  objectIn,
  type Placed,
  placedOf,
  revisionOf,
  seenPut,
  textOf,
} from "./etcdkeys.ts";
import {
  type Appended,
  type Decision,
  decide,
  FORGET_MEMBER_MS,
  type Ledger,
  type Member,
  type Proposal,
  type Record,
  recordOf,
  type Stretch,
  startOf,
  stretchWith,
} from "./ledger.ts";
import { LEASE_MS } from "./link.ts";
import { quote, RepriseError } from "./protocol.ts";

export type { Following, LiveMember } from "./etcdfollow.ts";

const VERSION = 1;
const SEEN_MS = 60_000;
/** Operations of one transaction; etcd takes 128. */
const MAX_OPERATIONS = 100;
/** Records of one revision, whoever has written them. */
const MAX_IN_REVISION = 128;
/** Of the paths in one, counted as link.ts counts what it sends on: one revision must fit a frame. */
const MAX_CHARACTERS = 150_000;
/** A change that is overtaken each time; each time somebody else's has got through. */
const MAX_TRIES = 100;

interface EtcdLedgerOptions {
  /** What the members keep, as all of them must; undefined for who keeps nothing, and makes no cluster. */
  store: string | undefined;
  /** Once it has gone, this member may come back with what it has: not so where it has no files of its own. */
  isSeen?: boolean;
  warn?: (text: string) => void;
}

/** What is kept of a path. */
interface Held {
  /** 0: nothing. */
  revision: number;
  /** Undefined too where what is there is no record. */
  record: Record | undefined;
}

const NOTHING: Held = { revision: 0, record: undefined };

export class EtcdLedger implements Ledger {
  readonly #etcd: Etcd;
  readonly #store: string | undefined;
  readonly #warn: (text: string) => void;
  readonly #keys: Keys;
  readonly #watchers: (() => void)[] = [];
  #id = "";
  #secret = "";
  /** What the cluster keeps, as it says: one that keeps nothing may have to begin its log anew, too. */
  #kept: string | undefined;
  /** Of the key `ledger`: a change of another log must not get into this one. */
  #ledgerRevision = 0;
  #revision = 0;
  #pruned = 0;
  #hasWarned = false;
  #follower: Follower | undefined;
  readonly #beats: Beats;

  constructor(etcd: Etcd, { store, isSeen = true, warn = () => {} }: EtcdLedgerOptions) {
    this.#etcd = etcd;
    this.#store = store;
    this.#warn = warn;
    this.#keys = new Keys(etcd.name);
    this.#beats = new Beats(etcd, this.#keys, isSeen, () => this.#id);
  }

  get id(): string {
    return this.#id;
  }

  get secret(): string {
    return this.#secret;
  }

  get revision(): number {
    return this.#revision;
  }

  get pruned(): number {
    return this.#pruned;
  }

  /** Makes the cluster where there is none. Throws `version`, `refused` where it keeps something else, and as `Etcd`; `busy` where it is not this one's to make. */
  async open(): Promise<void> {
    if (this.#store === undefined) await this.#checkMade();
    const { ledger, secret, pruned } = this.#keys;
    const made = JSON.stringify({ version: VERSION, id: randomUUID(), store: this.#store });
    const read = [get(ledger), get(secret), get(pruned)];
    const { responses } = await this.#etcd.txn({
      compare: [unchanged(ledger, 0)],
      success: [put(ledger, made), put(secret, randomBytes(32).toString("base64url")), ...read],
      failure: read,
    });
    const [facts, word, upTo] = responses!.slice(-3).map(({ response_range }) => response_range?.kvs?.[0]);
    if (!facts) throw new RepriseError("busy", "etcd does not have what it has just been given");
    this.#use(facts);
    this.#secret = word ? textOf(word) : await this.#makeSecret();
    this.#pruned = countIn(upTo);
  }

  async #checkMade(): Promise<void> {
    const { kvs = [] } = await this.#etcd.range({ key: encoded(this.#keys.ledger) });
    if (kvs.length === 0)
      throw new RepriseError("busy", `no server that has files has come to the cluster ${quote(this.#etcd.name)} yet`);
  }

  /** Somebody has removed it. */
  async #makeSecret(): Promise<string> {
    const { secret } = this.#keys;
    const made = put(secret, randomBytes(32).toString("base64url"));
    const { responses } = await this.#etcd.txn({
      compare: [unchanged(secret, 0)],
      success: [made, get(secret)],
      failure: [get(secret)],
    });
    const [word] = responses!.at(-1)!.response_range?.kvs ?? [];
    if (!word) throw new RepriseError("busy", "etcd does not have what it has just been given");
    return textOf(word);
  }

  #use(ledger: KeyValue): void {
    const { version, id, store } = objectIn(ledger) ?? {};
    const where = `the cluster ${quote(this.#etcd.name)} in etcd`;
    if (version !== VERSION)
      throw new RepriseError("version", `${where} is of version ${quote(String(version))}; here it is ${VERSION}`);
    if (store !== (this.#store ?? store) || typeof id !== "string")
      throw new RepriseError("refused", `${where} keeps ${quote(String(store))}, not ${quote(String(this.#store))}`);
    if (id !== this.#id) this.#revision = this.#pruned = 0;
    this.#id = id;
    this.#kept = String(store);
    this.#ledgerRevision = Number(ledger.mod_revision);
  }

  async renew(): Promise<void> {
    const { ledger, records, gone, seen, pruned } = this.#keys;
    const made = JSON.stringify({ version: VERSION, id: randomUUID(), store: this.#kept });
    const { responses } = await this.#etcd.txn({
      compare: [unchanged(ledger, this.#ledgerRevision)],
      // Those who were seen are known by revisions of the log that ends here.
      success: [...[records, gone, seen].map(removeAll), remove(pruned), put(ledger, made), get(ledger)],
      failure: [get(ledger)],
    });
    const [now] = responses!.at(-1)!.response_range?.kvs ?? [];
    if (now) this.#use(now);
    else await this.open();
  }

  // ------------------------------------------------------------------------------------------------ changes

  async append(origin: string, proposals: Proposal[]): Promise<Appended> {
    const decisions: Decision[] = [];
    const records: Record[] = [];
    for (const batch of batchesOf(proposals)) {
      const appended = await this.#appendBatch(origin, batch);
      decisions.push(...appended.decisions);
      records.push(...appended.records);
    }
    if (records.length > 0) this.#hear(records.at(-1)!.revision);
    return { decisions, records };
  }

  /** What is proposed as new is not looked for before: if something is there, the transaction says so. */
  async #appendBatch(origin: string, batch: Proposal[]): Promise<Appended> {
    const held = await this.#held(batch.filter((proposal) => !isNew(proposal)).map(({ path }) => path));
    const decisions = new Map<string, Decision>();
    for (let tries = 0; tries < MAX_TRIES; tries++) {
      const taken: Proposal[] = [];
      for (const proposal of batch) {
        if (decisions.has(proposal.path)) continue;
        const decision = decide(held.get(proposal.path)?.record, proposal);
        if (decision) decisions.set(proposal.path, decision);
        else taken.push(proposal);
      }
      const records = taken.length > 0 ? await this.#take(origin, taken, held) : [];
      if (!records) continue;
      for (const { path, revision } of records) decisions.set(path, { revision });
      return { decisions: batch.map(({ path }) => decisions.get(path)!), records };
    }
    throw new RepriseError("busy", "others change the same names all the time");
  }

  /** Undefined where something has changed since `held` was read, which then has that. */
  async #take(origin: string, taken: Proposal[], held: Map<string, Held>): Promise<Record[] | undefined> {
    const { ledger, recordOf: keyOf } = this.#keys;
    const records = taken.map((proposal) => recordOf(proposal, 0, origin, held.get(proposal.path)?.record));
    const { succeeded, header, responses } = await this.#etcd.txn({
      compare: [
        unchanged(ledger, this.#ledgerRevision),
        ...taken.map(({ path }) => unchanged(keyOf(path), held.get(path)?.revision ?? 0)),
      ],
      success: records.flatMap((record, at) => this.#puts(record, at)),
      failure: [...taken.map(({ path }) => get(keyOf(path))), get(ledger)],
    });
    const revision = Number(header.revision);
    if (succeeded) return records.map((record) => ({ ...record, revision }));
    const [log] = responses!.at(-1)!.response_range?.kvs ?? [];
    if (Number(log?.mod_revision) !== this.#ledgerRevision)
      throw new RepriseError("busy", "the log of the cluster has begun anew");
    for (const [at, { path }] of taken.entries()) held.set(path, this.#heldIn(responses![at]!.response_range));
    return undefined;
  }

  #puts({ path, revision: _, ...record }: Record, at: number): Operation[] {
    // `at`: the order within one revision.
    const puts = [put(this.#keys.recordOf(path), JSON.stringify({ ...record, at }))];
    if (record.kind === "gone") puts.push(put(this.#keys.goneOf(path), ""));
    return puts;
  }

  async #held(paths: string[]): Promise<Map<string, Held>> {
    if (paths.length === 0) return new Map();
    const { responses } = await this.#etcd.txn({ success: paths.map((path) => get(this.#keys.recordOf(path))) });
    return new Map(paths.map((path, at) => [path, this.#heldIn(responses![at]!.response_range)]));
  }

  #heldIn(answer: RangeAnswer | undefined): Held {
    const found = answer?.kvs?.[0];
    return found ? { revision: Number(found.mod_revision), record: this.#recordIn(found)?.record } : NOTHING;
  }

  async newest(path: string): Promise<Record | undefined> {
    return (await this.#held([path])).get(path)?.record;
  }

  // ------------------------------------------------------------------------------------------------ reading

  async read(after: number, limit: number, isWithinSnapshot = false): Promise<Stretch> {
    const [pruned] = (await this.#etcd.range({ key: encoded(this.#keys.pruned) })).kvs ?? [];
    this.#pruned = countIn(pruned);
    const start = startOf(this.#pruned, after, isWithinSnapshot);
    const records = await this.records(start.after, limit);
    const revision = Math.max(records.at(-1)?.revision ?? 0, start.after, this.#pruned);
    return stretchWith({ ...start, limit, records, revision });
  }

  /** In the order of their revisions, which etcd makes by looking at all there are: for a few, or a small log. */
  async records(after: number, limit: number): Promise<Record[]> {
    const records: Record[] = [];
    for (let start = after; records.length < limit; ) {
      const asked = Math.min(limit - records.length + MAX_IN_REVISION, PIECE);
      const { kvs = [], more = false } = await this.#sorted(start, asked);
      const last = revisionOf(kvs.at(-1));
      // The rest of the last revision may be missing.
      records.push(...this.#recordsIn(more ? kvs.filter((kv) => revisionOf(kv) < last) : kvs));
      this.#hear(records.at(-1)?.revision ?? 0);
      if (!more) break;
      // No revision has as many records as were asked for.
      if (last - 1 <= start) throw new RepriseError("busy", "etcd gives the same records again");
      start = last - 1;
    }
    const end = records.findIndex(({ revision }, at) => at >= limit && revision > records[at - 1]!.revision);
    return end < 0 ? records : records.slice(0, end);
  }

  #sorted(after: number, limit: number): Promise<RangeAnswer> {
    const { records } = this.#keys;
    return this.#etcd.range({
      key: encoded(records),
      range_end: endOf(records),
      min_mod_revision: String(after + 1),
      sort_order: "ASCEND",
      sort_target: "MOD",
      limit: String(limit),
    });
  }

  #recordsIn(kvs: KeyValue[]): Record[] {
    return inOrder(kvs.flatMap((kv) => this.#recordIn(kv) ?? []));
  }

  /** Undefined for what others have put there. */
  #recordIn(kv: KeyValue): Placed | undefined {
    const placed = placedOf(this.#keys, kv);
    if (!placed && !this.#hasWarned) {
      this.#hasWarned = true;
      const key = Buffer.from(kv.key, "base64").toString();
      this.#warn(`in etcd ${quote(key)} is no record of a path; it and others like it are left out`);
    }
    return placed;
  }

  /** There is a record of that revision. */
  #hear(revision: number): void {
    if (revision <= this.#revision) return;
    this.#revision = revision;
    for (const onNews of this.#watchers) onNews();
  }

  async watch(onNews: () => void): Promise<void> {
    this.#watchers.push(onNews);
    if (this.#follower) return;
    const ignore = () => {};
    this.follow(Math.max(this.#revision, 1), {
      onStretch: ignore,
      onMembers: ignore,
      onCurrent: ignore,
      onLost: ignore,
      onBack: ignore,
      onRenewed: ignore,
    });
  }

  /**
   * Gives what is newer than `after`, and whatever comes, until `unfollow`. `last`: the newest record that is known from
   * before. If etcd does not have it, it was put back from a backup, and the log begins anew.
   */
  follow(after: number, following: Following, last?: Pick<Record, "path" | "revision">): void {
    this.unfollow();
    this.#follower = new Follower({
      etcd: this.#etcd,
      keys: this.#keys,
      following,
      after,
      last,
      id: this.#id,
      beats: this.#beats,
      read: (kvs) => this.#recordsIn(kvs),
      hear: (revision) => this.#hear(revision),
      setPruned: (pruned) => {
        this.#pruned = pruned;
      },
      reopen: async () => {
        await this.open();
        return this.#id;
      },
      renew: async () => {
        this.#warn("etcd does not have the end of the log any more, which is now another: all say anew what they have");
        await this.renew();
        return this.#id;
      },
    });
    void this.#follower.run();
  }

  unfollow(): void {
    this.#follower?.stop();
    this.#follower = undefined;
  }

  // ------------------------------------------------------------------------------------------------ members

  /**
   * This member is there: to be said each second. Throws `refused` where another that is running has its name, which passes
   * within five seconds if that was itself at another address, and as `Etcd`.
   */
  beat(member: LiveMember & { node: string }): Promise<void> {
    return this.#beats.beat(member);
  }

  /** It ends: the others need not wait until its lease does. */
  leave(): Promise<void> {
    return this.#beats.leave();
  }

  async members(): Promise<(Member & { seen: number })[]> {
    const answer = await this.#etcd.range({ key: encoded(this.#keys.seen), range_end: endOf(this.#keys.seen) });
    const members = (answer.kvs ?? []).flatMap((kv) => this.#seenIn(kv) ?? []);
    return members.sort((a, b) => (a.address < b.address ? -1 : 1));
  }

  #seenIn(kv: KeyValue): (Member & { seen: number }) | undefined {
    const said = objectIn(kv);
    const node = keyIn(kv)?.slice(this.#keys.seen.length);
    if (!node || typeof said?.address !== "string" || !isCount(said.revision) || !isCount(said.seen)) return undefined;
    return { node, address: said.address, revision: said.revision, seen: said.seen };
  }

  async join(member: Member, now = Date.now()): Promise<void> {
    await this.#etcd.txn({ success: [seenPut(this.#keys, member, now)] });
  }

  async prune(own: number, now = Date.now()): Promise<void> {
    const members = await this.members();
    const forgotten = members.filter(({ seen }) => seen < now - FORGET_MEMBER_MS);
    for (const { node } of forgotten) await this.#etcd.txn({ success: [remove(this.#keys.seenOf(node))] });
    const left = members.filter((member) => !forgotten.includes(member));
    const passed = Math.min(own, ...left.map(({ revision }) => revision));
    await this.#pruneUpTo(passed);
  }

  async #pruneUpTo(passed: number): Promise<void> {
    for (let key = encoded(this.#keys.gone); ; ) {
      const { kvs = [], more } = await this.#etcd.range({
        key,
        range_end: endOf(this.#keys.gone),
        limit: String(PIECE),
        keys_only: true,
      });
      const old = kvs.filter(({ mod_revision }) => Number(mod_revision) <= passed);
      // What somebody else has put there may be no text.
      const paths = old.flatMap((kv) => keyIn(kv)?.slice(this.#keys.gone.length) ?? []);
      for (let at = 0; at < paths.length; at += MAX_OPERATIONS / 4)
        await this.#forget(paths.slice(at, at + MAX_OPERATIONS / 4), passed);
      if (!more) return;
      key = behind(kvs.at(-1)!);
    }
  }

  /** What was changed again since is no deletion any more. */
  async #forget(paths: string[], passed: number): Promise<void> {
    const { ledger, pruned, goneOf, recordOf } = this.#keys;
    for (let tries = 0; tries < MAX_TRIES; tries++) {
      const read = await this.#etcd.txn({
        success: [get(pruned), ...paths.flatMap((p) => [get(goneOf(p)), get(recordOf(p))])],
      });
      const [upTo, ...found] = read.responses!.map(({ response_range }) => response_range?.kvs?.[0]);
      const compare = [unchanged(ledger, this.#ledgerRevision), unchanged(pruned, revisionOf(upTo))];
      const success = [put(pruned, String(Math.max(passed, countIn(upTo))))];
      for (const [at, path] of paths.entries()) {
        const [marker, record] = [revisionOf(found[2 * at]), revisionOf(found[2 * at + 1])];
        if (marker === 0 || marker > passed) continue;
        compare.push(unchanged(goneOf(path), marker), unchanged(recordOf(path), record));
        success.push(remove(goneOf(path)));
        if (record === marker) success.push(remove(recordOf(path)));
      }
      if (success.length === 1) return;
      const { succeeded } = await this.#etcd.txn({ compare, success });
      if (!succeeded) continue;
      this.#pruned = Math.max(this.#pruned, passed);
      return;
    }
  }

  close(): void {
    this.unfollow();
    this.#etcd.close();
  }
}

// ---------------------------------------------------------------------------------------------------- beats

/** That this member is there, told each second. */
class Beats {
  readonly #etcd: Etcd;
  readonly #keys: Keys;
  readonly #isSeen: boolean;
  readonly #id: () => string;
  /** Tells this process from another with the same name. */
  readonly #session = randomUUID();
  #lease: string | undefined;
  /** Of the member's key. */
  #revision = 0;
  #seenAt = Number.NEGATIVE_INFINITY;
  #next: (LiveMember & { node: string }) | undefined;
  #running: Promise<void> | undefined;
  /** When the lease was last asked for that was then given; undefined before the first. */
  leasedAt: number | undefined;

  constructor(etcd: Etcd, keys: Keys, isSeen: boolean, id: () => string) {
    this.#etcd = etcd;
    this.#keys = keys;
    this.#isSeen = isSeen;
    this.#id = id;
  }

  /** One at a time; what is said meanwhile is said next, once. */
  beat(member: LiveMember & { node: string }): Promise<void> {
    this.#next = member;
    this.#running ??= this.#run().finally(() => {
      this.#running = undefined;
    });
    return this.#running;
  }

  async #run(): Promise<void> {
    while (this.#next) {
      const member = this.#next;
      this.#next = undefined;
      await this.#say(member);
    }
  }

  async #say(member: LiveMember & { node: string }): Promise<void> {
    for (let tries = 0; tries < MAX_TRIES; tries++) {
      const asked = performance.now();
      const isLeased = this.#lease !== undefined;
      this.#lease ??= await this.#etcd.grant(LEASE_MS / 1000);
      try {
        const lease = this.#lease;
        const [isKept, isSaid] = await Promise.all([
          !isLeased || this.#etcd.keepAlive(lease),
          this.#put(member, lease),
        ]);
        if (isKept) this.leasedAt = asked;
        else this.#lease = undefined;
        if (isKept && isSaid) return;
      } catch (error) {
        // It has ended between the two.
        if (!(error instanceof RepriseError && error.code === "not_found")) throw error;
        this.#lease = undefined;
      }
    }
    throw new RepriseError("busy", "the lease of this member ends again and again");
  }

  /** False where the key was not as this one had left it: then it is known how it is. */
  async #put({ node, ...member }: LiveMember & { node: string }, lease: string): Promise<boolean> {
    const key = this.#keys.memberOf(node);
    const value = JSON.stringify({ ...member, ledger: this.#id(), session: this.#session });
    const now = performance.now();
    const isDue = this.#isSeen && now - this.#seenAt >= SEEN_MS;
    const seen = isDue ? [seenPut(this.#keys, { node, ...member }, Date.now())] : [];
    const { succeeded, header, responses } = await this.#etcd.txn({
      compare: [unchanged(key, this.#revision)],
      success: [put(key, value, lease), ...seen],
      failure: [get(key)],
    });
    if (succeeded) {
      this.#revision = Number(header.revision);
      if (isDue) this.#seenAt = now;
      return true;
    }
    const [found] = responses![0]!.response_range?.kvs ?? [];
    this.#checkMine(found, member.address);
    this.#revision = revisionOf(found);
    return false;
  }

  /** One that was killed and started again at the same address takes its own place. */
  #checkMine(found: KeyValue | undefined, address: string): void {
    const said = found && objectIn(found);
    if (!said || said.session === this.#session || said.address === address) return;
    const what = `the member ${quote(String(said.address))} has the same name`;
    throw new RepriseError("refused", `refused: ${what}; if the root was copied from there, remove the .reprise in it`);
  }

  async leave(): Promise<void> {
    await this.#running?.catch(() => {});
    const lease = this.#lease;
    this.#lease = undefined;
    this.leasedAt = undefined;
    if (lease === undefined) return;
    await this.#etcd.revoke(lease);
  }
}

// ---------------------------------------------------------------------------------------------------- batches

/** It is likely that nothing is there. */
function isNew({ base, version }: Proposal): boolean {
  return base === 0 && version.kind !== "gone";
}

/** In order, each path once in each, and as many as one transaction takes. */
function batchesOf(proposals: Proposal[]): Proposal[][] {
  const batches: Proposal[][] = [];
  let paths = new Set<string>();
  let [operations, characters] = [0, 0];
  for (const proposal of proposals) {
    const { path, version } = proposal;
    const length = 200 + JSON.stringify(path).length;
    operations += version.kind === "gone" ? 2 : 1;
    characters += length;
    const isFull = paths.has(path) || operations > MAX_OPERATIONS || characters > MAX_CHARACTERS;
    if (isFull || batches.length === 0) {
      batches.push([]);
      paths = new Set();
      operations = version.kind === "gone" ? 2 : 1;
      characters = length;
    }
    batches.at(-1)!.push(proposal);
    paths.add(path);
  }
  return batches;
}
