/** The ledger in a real etcd, beyond what every ledger does: members that come and go, and what happens to its connections. */
import { afterAll, afterEach, beforeAll, describe, expect, setDefaultTimeout, test } from "bun:test";
import { cpSync, rmSync, writeFileSync } from "node:fs";
import { join } from "node:path";
import { Etcd, type EtcdCluster, type EtcdOptions, encoded, parseCluster, put, remove } from "../etcd.ts";
import { Follower } from "../etcdfollow.ts";
import { Keys } from "../etcdkeys.ts";
import { EtcdLedger, type LiveMember } from "../etcdledger.ts";
import type { Appended, Record, Stretch, Version } from "../ledger.ts";
import type { RepriseError } from "../protocol.ts";
import { authority, hasOpenssl } from "./certificates.ts";
import { noEtcd, startEtcd } from "./engines.ts";
import { TEST_MS, temporaryFolder, waitFor } from "./fixtures.ts";

setDefaultTimeout(TEST_MS);
if (noEtcd) console.log(`skipped: tests on a real etcd: ${noEtcd}`);

type Engine = Awaited<ReturnType<typeof startEtcd>>;
const LIMIT = 100_000;
const file = (digit: string): Version => ({ kind: "file", size: 1, mtime: 1, sha256: digit.repeat(64) });
const [A, B, C] = [file("a"), file("b"), file("c")];
const GONE: Version = { kind: "gone", size: 0, mtime: 0, sha256: "" };
const proposal = (path: string, base: number, version: Version) => ({ path, base, version });

let shared: Engine;
let clusters = 0;
beforeAll(async () => {
  if (!noEtcd) shared = await startEtcd();
});
afterAll(async () => await shared?.[Symbol.asyncDispose]());

/** What a test has opened; closed after it. */
const open: (() => void)[] = [];
afterEach(() => {
  for (const close of open.splice(0)) close();
});

const freshName = () => `test-${++clusters}`;

interface Options extends EtcdOptions {
  store?: string | undefined;
  warn?: (text: string) => void;
}

function ledgerAt(cluster: EtcdCluster, given: Options = {}): EtcdLedger {
  const { store, warn, ...options } = { store: "folder", ...given };
  const ledger = new EtcdLedger(new Etcd(cluster, options), { store, ...(warn && { warn }) });
  open.push(() => ledger.close());
  return ledger;
}

async function openLedger(engine: Engine, name: string, options?: Options): Promise<EtcdLedger> {
  const ledger = ledgerAt(parseCluster(engine.url(name)), options);
  await ledger.open();
  return ledger;
}

/** All that a follower is told; `beating`: and says each second that it is there, as a keeper does. */
function followed(ledger: EtcdLedger, after = 0, last?: Pick<Record, "path" | "revision">) {
  const told = {
    stretches: [] as Stretch[],
    members: new Map<string, LiveMember>(),
    current: 0,
    lost: [] as RepriseError[],
    backs: 0,
    renewed: [] as string[],
    get records(): Record[] {
      return told.stretches.flatMap(({ records }) => records);
    },
    get paths(): string[] {
      return told.records.map(({ path }) => path);
    },
  };
  ledger.follow(
    after,
    {
      onStretch: (stretch) => void told.stretches.push(stretch),
      onMembers: (members) => {
        told.members = members;
      },
      onCurrent: () => void told.current++,
      onLost: (error) => void told.lost.push(error),
      onBack: () => void told.backs++,
      onRenewed: (id) => void told.renewed.push(id),
    },
    last,
  );
  return told;
}

function beating(ledger: EtcdLedger, node: string, more: Partial<LiveMember> = {}): () => void {
  const beat = () =>
    void ledger
      .beat({ node, address: `${node}:1`, known: ledger.revision, revision: ledger.revision, live: true, ...more })
      .catch(() => {});
  beat();
  const timer = setInterval(beat, 1000);
  const stop = () => clearInterval(timer);
  open.push(stop);
  return stop;
}

/** In order, and each goes on where the one before has ended. */
function expectNoGap(stretches: Stretch[], cursor = 0): void {
  let at = cursor;
  for (const { after, revision, records, snapshot } of stretches) {
    if (!(snapshot && after === 0)) expect(after).toBe(at);
    expect(revision).toBeGreaterThanOrEqual(after);
    if (!snapshot) for (const record of records) expect(record.revision).toBeGreaterThan(after);
    at = revision;
  }
}

function revisionOf({ decisions }: Appended, at = 0): number {
  const decision = decisions[at]!;
  if (!("revision" in decision)) throw new Error(`refused for ${decision.refusedFor}`);
  return decision.revision;
}

async function failure(promise: Promise<unknown>): Promise<RepriseError> {
  return promise.then(
    () => {
      throw new Error("it did not fail");
    },
    (error) => error,
  );
}

describe("parseCluster()", () => {
  const none = {};

  test("reads hosts, name, user and password", () => {
    expect(parseCluster("etcd://127.0.0.1:1,[::1]:2,Host/files.v-1_", none)).toEqual({
      name: "files.v-1_",
      endpoints: ["http://127.0.0.1:1", "http://[::1]:2", "http://host:2379"],
      tls: undefined,
    });
    expect(parseCluster("etcds://ann:p%40%2F:@a,b:1/n", none)).toEqual({
      name: "n",
      endpoints: ["https://a:2379", "https://b:1"],
      user: "ann",
      password: "p@/:",
      tls: {},
    });
  });

  test("takes from the environment what is not there", () => {
    const environment = { REPRISE_ETCD_USER: "ann", REPRISE_ETCD_PASSWORD: "secret" };
    expect(parseCluster("etcd://localhost/n", environment)).toMatchObject({ user: "ann", password: "secret" });
    expect(parseCluster("etcd://bob@localhost/n", environment)).toMatchObject({ user: "bob", password: "secret" });
    expect(parseCluster("etcd://bob:x@localhost/n", environment)).toMatchObject({ user: "bob", password: "x" });
    using folder = temporaryFolder();
    const ca = join(folder.path, "ca");
    writeFileSync(ca, "PEM");
    expect(parseCluster("etcds://h/n", { ETCDCTL_CACERT: ca }).tls).toEqual({ ca: "PEM" });
    expect(parseCluster("etcds://h/n", { ETCDCTL_CACERT: "/none", REPRISE_ETCD_CACERT: ca }).tls).toEqual({
      ca: "PEM",
    });
    expect(parseCluster("etcds://h/n", { ETCDCTL_CERT: ca, ETCDCTL_KEY: ca }).tls).toEqual({ cert: "PEM", key: "PEM" });
    expect(() => parseCluster("etcds://h/n", { ETCDCTL_CACERT: "/none" })).toThrow('cannot read "/none": ENOENT');
    expect(() => parseCluster("etcds://h/n", { ETCDCTL_CERT: ca })).toThrow("needs its key");
  });

  test.each([
    "http://h/n",
    "etcd://h",
    "etcd://h/",
    "etcd:///n",
    "etcd://h/a/b",
    "etcd://h/a b",
    "etcd://h/..",
    `etcd://h/${"n".repeat(65)}`,
    "etcd://h:0/n",
    "etcd://h:65536/n",
    "etcd://h:x/n",
    "etcd://h,/n",
    "etcd://[::1/n",
    "etcd://ann@localhost/n",
    "etcd://ann:%zz@localhost/n",
    "etcd://:secret@localhost/n",
  ])("refuses %s", (text) => {
    expect(() => parseCluster(text, none)).toThrow(expect.objectContaining({ code: "usage" }));
  });

  test("shows no password, and sends none in clear to another machine", () => {
    const message = (text: string) => {
      try {
        return String(parseCluster(text, none));
      } catch (error) {
        return `${(error as RepriseError).code}: ${(error as RepriseError).message}`;
      }
    };
    expect(message("etcd://ann:secret@h:x/n")).not.toContain("secret");
    expect(message("etcd://ann:secret@h/n/n")).not.toContain("secret");
    expect(message("etcd:ann:secret@h/n")).not.toContain("secret");
    expect(message("etcd://ann:secret\nsecret@h")).not.toContain("secret");
    expect(message("etcd://ann:secret@10.0.0.1/n")).toBe(
      "insecure: no password is sent in clear to another machine; use etcds://10.0.0.1…",
    );
    for (const host of ["localhost", "127.0.0.2", "[::1]"])
      expect(parseCluster(`etcd://ann:secret@${host}/n`, none).user).toBe("ann");
  });
});

test("who has become live is told of before a change that comes with it, as it has to be waited for", async () => {
  const keys = new Keys("x");
  const kv = (key: string, value: object, revision: number) => ({
    key: encoded(key),
    value: encoded(JSON.stringify(value)),
    mod_revision: String(revision),
  });
  const ledger = kv(keys.ledger, { version: 1, id: "id", store: "folder" }, 1);
  const member = { address: "b:1", known: 1, revision: 1, live: true, ledger: "id" };
  const told: string[] = [];
  const etcd = {
    endpoints: ["http://x"],
    callAt: async () => ({ header: { revision: "1" }, responses: [{ response_range: { kvs: [ledger] } }, {}, {}] }),
    // As etcd sends together what comes while a watch is behind.
    async *watch() {
      const events = [kv(keys.memberOf("b"), member, 2), kv(keys.recordOf("f"), {}, 3)].map((kv) => ({ kv }));
      yield { header: { revision: "3" }, events };
      await new Promise(() => {});
    },
  };
  const follower = new Follower({
    etcd: etcd as unknown as Etcd,
    keys,
    id: "id",
    after: 1,
    last: undefined,
    beats: { leasedAt: undefined },
    following: {
      onStretch: ({ revision }) => void told.push(`records up to ${revision}`),
      onMembers: (members) => void told.push(`members ${[...members.keys()]}`),
      onCurrent: () => {},
      onLost: () => {},
      onBack: () => {},
      onRenewed: () => {},
    },
    read: () => [],
    hear: () => {},
    setPruned: () => {},
    reopen: async () => "id",
    renew: async () => "id",
  });
  open.push(() => follower.stop());
  void follower.run();
  await waitFor("both", () => told.includes("records up to 3") && told.includes("members b"));
  expect(told).toEqual(["members ", "members b", "records up to 3"]);
});

describe.skipIf(noEtcd !== undefined)("EtcdLedger", () => {
  test("open() makes the cluster once, and refuses one that keeps something else or is of another version", async () => {
    const name = freshName();
    const all = await Promise.all(Array.from({ length: 8 }, () => openLedger(shared, name)));
    expect(new Set(all.map(({ id, secret }) => `${id} ${secret}`)).size).toBe(1);
    expect(all[0]!.secret).toMatch(/^[\w-]{43}$/);
    const other = await failure(openLedger(shared, name, { store: "s3://bucket/" }));
    expect([other.code, other.message]).toEqual([
      "refused",
      `the cluster "${name}" in etcd keeps "folder", not "s3://bucket/"`,
    ]);
    const etcd = new Etcd(parseCluster(shared.url(name)));
    await etcd.txn({ success: [put(`/reprise/${name}/ledger`, '{"version":2,"id":"x","store":"folder"}')] });
    const newer = await failure(openLedger(shared, name));
    expect([newer.code, newer.message]).toEqual([
      "version",
      `the cluster "${name}" in etcd is of version "2"; here it is 1`,
    ]);
    await etcd.txn({ success: [put(`/reprise/${name}/ledger`, "not JSON")] });
    expect((await failure(openLedger(shared, name))).code).toBe("version");
    etcd.close();
  });

  test("follow() gives all there is, what comes, and who is there", async () => {
    const name = freshName();
    const [mine, theirs] = [await openLedger(shared, name), await openLedger(shared, name)];
    await mine.append("me", [proposal("a", 0, A), proposal("b", 0, B)]);
    const told = followed(theirs);
    await waitFor("what is there", () => told.current);
    expect(told.stretches).toMatchObject([{ after: 0, snapshot: "complete" }]);
    const { records } = await mine.append("me", [proposal("c", 0, C)]);
    await waitFor("what comes", () => told.paths.includes("c"));
    expect(told.records.at(-1)).toEqual(records[0]!);
    beating(mine, "m", { problem: "why" });
    const { revision } = records[0]!;
    await waitFor("the member", () => told.members.get("m"));
    expect(told.members.get("m")).toEqual({
      address: "m:1",
      known: revision,
      revision,
      live: true,
      nodes: [],
      problem: "why",
    });
    expectNoGap(told.stretches);
    // From where one has come to: no snapshot.
    const later = followed(theirs, records[0]!.revision - 1, records[0]);
    await waitFor("the rest", () => later.current);
    expect(later.stretches).toEqual([{ after: revision - 1, revision, records }]);
    await mine.leave();
    await waitFor("that it has left", () => later.members.size === 0);
  });

  test("10,000 records, written in batches, come back in pieces: as they are read, as a snapshot, and as history", async () => {
    const name = freshName();
    const ledger = await openLedger(shared, name);
    const [first] = (await ledger.append("me", [proposal("first", 0, A)])).records;
    const proposals = Array.from({ length: 10_000 }, (_, at) =>
      proposal(`folder-${at % 100}/${at}-${"x".repeat(200)}`, 0, A),
    );
    const { records } = await ledger.append("me", proposals);
    expect(records.map(({ path }) => path)).toEqual(proposals.map(({ path }) => path));
    const read: Record[] = [];
    for (let after = first!.revision; ; ) {
      const { records, revision } = await ledger.read(after, 1999);
      if (revision === after) break;
      read.push(...records);
      after = revision;
    }
    expect(read).toEqual(records);
    const snapshot = followed(ledger);
    await waitFor("the snapshot", () => snapshot.current);
    expectNoGap(snapshot.stretches);
    expect(snapshot.stretches.length).toBeGreaterThan(10);
    expect(snapshot.stretches.map(({ snapshot }) => snapshot)).toEqual([
      ...snapshot.stretches.slice(1).map(() => "part" as const),
      "complete",
    ]);
    const byPath = (a: Record, b: Record) => (a.path < b.path ? -1 : 1);
    expect(snapshot.records.sort(byPath)).toEqual([first!, ...records].sort(byPath));
    // History comes in messages that are cut between the records of one revision.
    const history = followed(ledger, first!.revision, first);
    await waitFor("the history", () => history.current);
    expectNoGap(history.stretches, first!.revision);
    expect(history.records).toEqual(records);
    const ends = history.stretches.map(({ records }) => records.at(-1)!.revision);
    const begins = history.stretches.map(({ records }) => records[0]!.revision);
    for (const [at, end] of ends.slice(0, -1).entries()) expect(begins[at + 1]).toBeGreaterThan(end);
  });

  test("a batch is cut by its size, too: the longest names", async () => {
    const ledger = await openLedger(shared, freshName());
    const long = (at: number) => `${String(at).padStart(250, "x")}/`.repeat(16) + "\u{1f600}".repeat(20);
    const { records } = await ledger.append(
      "me",
      Array.from({ length: 150 }, (_, at) => proposal(long(at), 0, A)),
    );
    const size = new Map<number, number>();
    for (const { path, revision } of records) size.set(revision, (size.get(revision) ?? 0) + 200 + path.length);
    expect(Math.max(...size.values())).toBeLessThanOrEqual(150_000);
    expect((await ledger.read(0, LIMIT)).records).toEqual(records);
    const told = followed(ledger);
    await waitFor("the snapshot", () => told.current);
    expect(told.records.length).toBe(150);
  });

  test("of those who race for the same names one wins each round, and all see the same", async () => {
    const name = freshName();
    const racers = await Promise.all([A, B, C].map(() => openLedger(shared, name)));
    const paths = Array.from({ length: 120 }, (_, at) => `p${at}`);
    const bases = new Map(paths.map((path) => [path, 0]));
    for (let round = 0; round < 6; round++) {
      const appended = await Promise.all(
        racers.map((racer, at) => {
          const version = { ...A, sha256: `${round}${at}`.repeat(32) };
          return racer.append(
            `n${at}`,
            paths.map((path) => proposal(path, bases.get(path)!, version)),
          );
        }),
      );
      for (const [at, path] of paths.entries()) {
        const won = appended.flatMap(({ decisions }) => ("revision" in decisions[at]! ? [decisions[at].revision] : []));
        expect(won).toHaveLength(1);
        const newest = (await racers[0]!.newest(path))!;
        expect(newest.revision).toBe(won[0]!);
        bases.set(path, won[0]!);
      }
    }
  });

  test("a history that etcd has forgotten is answered by a snapshot, in mid-watch as well", async () => {
    const name = freshName();
    const ledger = await openLedger(shared, name);
    const writer = await openLedger(shared, name);
    const etcd = new Etcd(parseCluster(shared.url(name)));
    const [a] = (await writer.append("me", [proposal("a", 0, A), proposal("b", 0, A)])).records;
    await writer.append("me", [proposal("a", a!.revision, GONE)]);
    const { records } = await writer.append("me", [proposal("c", 0, C)]);
    await etcd.call("/v3/kv/compaction", { revision: String(records[0]!.revision) });
    const told = followed(ledger, a!.revision, a);
    await waitFor("all of it", () => told.current);
    expect(told.stretches).toMatchObject([{ after: 0, snapshot: "complete" }]);
    expect(told.records.map(({ path, kind }) => `${path} ${kind}`).sort()).toEqual(["a gone", "b file", "c file"]);
    // And goes on from there, whatever is forgotten then.
    const { records: more } = await writer.append("me", [proposal("d", 0, A)]);
    await waitFor("what comes", () => told.paths.includes("d"));
    await etcd.call("/v3/kv/compaction", { revision: String(more[0]!.revision) });
    await writer.append("me", [proposal("e", 0, A)]);
    await waitFor("what comes then", () => told.paths.includes("e"));
    expect(told.stretches.slice(1).map(({ snapshot }) => snapshot)).toEqual([undefined, undefined]);
    etcd.close();
  });

  test("a history that etcd takes long to collect is waited for, longer each time", async () => {
    const name = freshName();
    using proxy = proxyOf(shared);
    const ledger = ledgerAt(proxy.cluster(name));
    await ledger.open();
    const { records } = await ledger.append("me", [proposal("a", 0, A), proposal("b", 0, A)]);
    const rest = await ledger.append("me", [proposal("c", 0, A)]);
    let watches = 0;
    proxy.onRequest = (path) => (path === "/v3/watch" && ++watches > 0 ? "slow" : "pass");
    const told = followed(ledger, records[0]!.revision, records[0]);
    await waitFor("the history", () => told.current);
    expect(told.records).toEqual(rest.records);
    expect(watches).toBeGreaterThan(1);
    // etcd is there all the while.
    expect(told.lost).toEqual([]);
  });

  test("what is no record is left out, and said once", async () => {
    const name = freshName();
    const warnings: string[] = [];
    const ledger = await openLedger(shared, name, { warn: (text) => void warnings.push(text) });
    const etcd = new Etcd(parseCluster(shared.url(name)));
    const good = (await ledger.append("me", [proposal("good", 0, A)])).records;
    const value = JSON.stringify({ ...A, origin: "me", over: "" });
    const bad = ["a//b", "../x", "/x", "x/", ".reprise/x", "x.part", "line\n", ""];
    for (const path of bad) await etcd.txn({ success: [put(`/reprise/${name}/records/${path}`, value)] });
    for (const text of [
      "",
      "[]",
      "null",
      "{}",
      '{"kind":"file"}',
      value.replace("aaaa", "zzzz"),
      value.replace('"size":1', '"size":-1'),
    ])
      await etcd.txn({ success: [put(`/reprise/${name}/records/value${text.length}`, text)] });
    const bytes = Buffer.concat([Buffer.from(`/reprise/${name}/records/`), Buffer.of(0xff, 0xfe)]).toString("base64");
    await etcd.txn({ success: [{ request_put: { key: bytes, value: encoded(value) } }] });
    const told = followed(ledger);
    await waitFor("the rest", () => told.current);
    expect(told.records).toEqual(good);
    expect((await ledger.read(0, LIMIT)).records).toEqual(good);
    expect(warnings).toHaveLength(1);
    // It is in nobody's way.
    expect(revisionOf(await ledger.append("me", [proposal("value0", 0, A)]))).toBeGreaterThan(0);
    etcd.close();
  });

  test("what is large and no record keeps nobody from reading the others", async () => {
    const name = freshName();
    const warnings: string[] = [];
    const ledger = await openLedger(shared, name, { warn: (text) => void warnings.push(text) });
    const etcd = new Etcd(parseCluster(shared.url(name)));
    const paths = Array.from({ length: 12 }, (_, at) => `good-${String(at).padStart(2, "0")}`);
    // More together than etcd gives its gateway in one answer.
    for (const path of paths) {
      await ledger.append("me", [proposal(path, 0, A)]);
      await etcd.txn({ success: [put(`/reprise/${name}/records/${path}-not`, "x".repeat(1_400_000))] });
    }
    const snapshot = followed(ledger);
    await waitFor("the snapshot", () => snapshot.current);
    expect(snapshot.paths.toSorted()).toEqual(paths);
    expectNoGap(snapshot.stretches);
    const first = await ledger.newest(paths[0]!);
    const history = followed(ledger, first!.revision, first);
    await waitFor("the history", () => history.current);
    expect(history.paths).toEqual(paths.slice(1));
    expect(warnings).toHaveLength(1);
    etcd.close();
  });

  test("what somebody has put beneath the other keys is in nobody's way either", async () => {
    const name = freshName();
    const ledger = await openLedger(shared, name);
    const etcd = new Etcd(parseCluster(shared.url(name)));
    await ledger.append("me", [proposal("f", 0, A)]);
    const gone = await ledger.append("me", [
      proposal("f", revisionOf(await ledger.append("me", [proposal("f", 0, A)])), GONE),
    ]);
    const odd = Buffer.of(0xff, 0xfe);
    for (const kind of ["gone", "members", "seen", "records", "other"]) {
      for (const value of ["", "null", "[]", "5", "not JSON", '{"address":5}']) {
        const keys = [
          Buffer.from(`x${value.length}`),
          Buffer.from("a//b"),
          odd,
          Buffer.concat([odd, odd]),
          Buffer.alloc(0),
        ];
        for (const key of keys) {
          const whole = Buffer.concat([Buffer.from(`/reprise/${name}/${kind}/`), key]).toString("base64");
          await etcd.txn({ success: [{ request_put: { key: whole, value: encoded(value) } }] });
        }
      }
    }
    await etcd.txn({ success: [put(`/reprise/${name}/pruned`, "not a number")] });
    const told = followed(ledger);
    await waitFor("what is there", () => told.current);
    expect(told.records).toMatchObject([{ path: "f", kind: "gone" }]);
    expect([...told.members]).toEqual([]);
    expect(await ledger.members()).toEqual([]);
    const later = revisionOf(await ledger.append("me", [proposal("g", 0, A)]));
    expect(later).toBeGreaterThan(revisionOf(gone));
    await ledger.prune(later);
    expect(ledger.pruned).toBe(later);
    expect(await ledger.newest("f")).toBeUndefined();
    beating(ledger, "m");
    await waitFor("the member", () => told.members.get("m"));
    etcd.close();
  });

  test("a member that beats no more has gone with its lease; one that beats again is there again", async () => {
    const name = freshName();
    const [mine, theirs] = [await openLedger(shared, name), await openLedger(shared, name)];
    const told = followed(theirs);
    const stop = beating(mine, "m");
    await waitFor("the member", () => told.members.has("m"));
    stop();
    await waitFor("that it has gone", () => !told.members.has("m"));
    beating(mine, "m");
    await waitFor("that it is there again", () => told.members.has("m"));
    expect(await theirs.members()).toMatchObject([{ node: "m", address: "m:1" }]);
  });

  test("a lease that has ended can be ended once more, as happens when the answer was lost", async () => {
    const etcd = new Etcd(parseCluster(shared.url(freshName())));
    open.push(() => etcd.close());
    const lease = await etcd.grant(600);
    await etcd.revoke(lease);
    expect(await etcd.keepAlive(lease)).toBe(false);
    await etcd.revoke(lease);
  });

  test("a log that one without files begins anew keeps what it kept", async () => {
    const name = freshName();
    const member = await openLedger(shared, name);
    const front = ledgerAt(parseCluster(shared.url(name)), { store: undefined });
    await front.open();
    await front.renew();
    expect(front.id).not.toBe(member.id);
    await member.open();
    expect(member.id).toBe(front.id);
  });

  test("who does not get through to say that it is there is told so, as it may be taken for gone", async () => {
    const name = freshName();
    using proxy = proxyOf(shared);
    const ledger = ledgerAt(proxy.cluster(name), { tryMs: 300, patienceMs: 300 });
    await ledger.open();
    const told = followed(ledger);
    beating(ledger, "m");
    await waitFor("the member", () => told.members.has("m"));
    // The watch goes on, and others keep it from being silent.
    beating(await openLedger(shared, name), "other");
    proxy.onRequest = (path) => (path === "/v3/lease/keepalive" ? "silent" : "pass");
    await waitFor("the loss", () => told.lost.length);
    proxy.onRequest = () => "pass";
    await waitFor("the return", () => told.backs);
    expect(told.lost[0]!.code).toBe("busy");
  });

  test("two that have one name: the second is refused while the first is there", async () => {
    const name = freshName();
    const [first, second] = [await openLedger(shared, name), await openLedger(shared, name)];
    const member = { node: "m", known: 0, revision: 0, live: true };
    await first.beat({ ...member, address: "a:1" });
    const error = await failure(second.beat({ ...member, address: "b:1" }));
    expect([error.code, error.message]).toEqual([
      "refused",
      'refused: the member "a:1" has the same name; if the root was copied from there, remove the .reprise in it',
    ]);
    // At the same address it can only be the one that was there before.
    await second.beat({ ...member, address: "a:1" });
    await second.leave();
    await second.beat({ ...member, address: "b:1" });
  });

  test("what has become of a change that was not answered is found when it is proposed again", async () => {
    const name = freshName();
    using proxy = proxyOf(shared);
    const ledger = ledgerAt(proxy.cluster(name), { tryMs: 300, patienceMs: 1000 });
    await ledger.open();
    const direct = await openLedger(shared, name);
    // Carried out, and the answer lost.
    proxy.onRequest = once("/v3/kv/txn", "swallow");
    const a = await ledger.append("me", [proposal("a", 0, A)]);
    expect(revisionOf(a)).toBe((await direct.newest("a"))!.revision);
    // Lost on its way there.
    proxy.onRequest = once("/v3/kv/txn", "silent");
    expect(revisionOf(await ledger.append("me", [proposal("b", 0, A)]))).toBe((await direct.newest("b"))!.revision);
    // Late: it comes when it has been said again, and when others have changed it since.
    proxy.onRequest = once("/v3/kv/txn", "late");
    const c = revisionOf(await ledger.append("me", [proposal("c", 0, A)]));
    const changed = revisionOf(await direct.append("you", [proposal("c", c, B)]));
    await proxy.sendLate();
    expect(await direct.newest("c")).toMatchObject({ revision: changed, ...B });
    // No answer at all: the next time it is known.
    proxy.onRequest = (path) => (path === "/v3/kv/txn" ? "swallow" : "pass");
    expect((await failure(ledger.append("me", [proposal("d", 0, A)]))).code).toBe("busy");
    proxy.onRequest = () => "pass";
    const d = (await direct.newest("d"))!.revision;
    expect(await ledger.append("me", [proposal("d", 0, A)])).toEqual({ decisions: [{ revision: d }], records: [] });
  });

  test("a log that began anew is another: what was based on the old one does not get in", async () => {
    const name = freshName();
    const [mine, theirs] = [await openLedger(shared, name), await openLedger(shared, name)];
    await mine.append("me", [proposal("a", 0, A)]);
    const told = followed(theirs);
    await waitFor("what is there", () => told.current);
    const deaf = await openLedger(shared, name);
    await mine.renew();
    const error = await failure(deaf.append("me", [proposal("b", 0, A)]));
    expect(error.message).toBe("the log of the cluster has begun anew");
    await waitFor("that it is another", () => told.renewed.length);
    expect(told.renewed).toEqual([mine.id]);
    expect(theirs.id).toBe(mine.id);
    const anew = followed(theirs);
    await theirs.append("me", [proposal("b", 0, A)]);
    await waitFor("the new one", () => anew.paths.includes("b"));
    expect(anew.paths).toEqual(["b"]);
    // Both may notice what makes it necessary: one of them does it.
    await Promise.all([mine.renew(), theirs.renew()]);
    expect((await openLedger(shared, name)).id).toBe(mine.id);
    expect(theirs.id).toBe(mine.id);
    // Somebody removes everything.
    const etcd = new Etcd(parseCluster(shared.url(name)));
    const last = followed(theirs);
    await waitFor("the third", () => last.current);
    await etcd.txn({ success: [remove(`/reprise/${name}/ledger`)] });
    await waitFor("a fourth", () => last.renewed.length);
    etcd.close();
  });

  test("unreachable, and what is no etcd: says which and why", async () => {
    const at = (hosts: string) => ledgerAt(parseCluster(`etcd://${hosts}/n`), { patienceMs: 100, tryMs: 300 });
    const nobody = await failure(at("127.0.0.1:1,localhost:2").open());
    expect([nobody.code, nobody.message]).toEqual([
      "busy",
      "etcd cannot be used (127.0.0.1:1: connection refused; localhost:2: connection refused)",
    ]);
    using web = Bun.serve({ port: 0, hostname: "127.0.0.1", fetch: () => new Response("<html>", { status: 200 }) });
    const page = await failure(at(`127.0.0.1:${web.port}`).open());
    expect([page.code, page.message]).toEqual([
      "version",
      `etcd cannot be used (127.0.0.1:${web.port}: there is no JSON gateway of etcd 3.4 or later)`,
    ]);
    using none = Bun.serve({ port: 0, hostname: "127.0.0.1", fetch: () => new Response("Not Found", { status: 404 }) });
    expect((await failure(at(`127.0.0.1:${none.port}`).open())).message).toContain(
      "no etcd 3.4 or later answers there (HTTP 404)",
    );
    using silent = Bun.listen({ port: 0, hostname: "127.0.0.1", socket: { data() {} } });
    expect((await failure(at(`127.0.0.1:${silent.port}`).open())).message).toContain("no answer within 0.3 s");
    // And a good one among them is enough.
    const { host } = new URL(shared.endpoints[0]!);
    await at(`127.0.0.1:1,127.0.0.1:${silent.port},127.0.0.1:${none.port},${host}`).open();
  });
});

describe.skipIf(noEtcd !== undefined)("etcd that is put back from a backup", () => {
  test("begins anew: one that follows notices, and one that comes later", async () => {
    await using engine = await startEtcd();
    const name = freshName();
    const ledger = await openLedger(engine, name);
    const told = followed(ledger);
    await ledger.append("me", [proposal("a", 0, A)]);
    const data = join(engine.folder, "member0");
    await engine.stop(0);
    cpSync(data, `${data}.backup`, { recursive: true });
    await engine.restart(0);
    const { records } = await ledger.append("me", [proposal("b", 0, B), proposal("c", 0, C)]);
    await waitFor("what comes", () => told.paths.includes("c"));
    const { id } = ledger;
    await engine.kill(0);
    rmSync(data, { recursive: true });
    cpSync(`${data}.backup`, data, { recursive: true });
    await engine.restart(0);
    await waitFor("that it is another", () => told.renewed.length);
    expect(ledger.id).not.toBe(id);
    expect(told.renewed).toEqual([ledger.id]);
    expect((await ledger.read(0, LIMIT)).records).toEqual([]);

    // The same while nobody follows, and etcd's revision has passed what is missing before anybody looks.
    await engine.kill(0);
    rmSync(data, { recursive: true });
    cpSync(`${data}.backup`, data, { recursive: true });
    await engine.restart(0);
    const etcd = new Etcd(parseCluster(engine.url(name)));
    for (let at = 0; at < 20; at++) await etcd.txn({ success: [put("/elsewhere", String(at))] });
    etcd.close();
    const later = await openLedger(engine, name);
    expect(later.id).toBe(id);
    const [, c] = records;
    const anew = followed(later, c!.revision, c);
    await waitFor("that it is another", () => anew.renewed.length);
    // Where nothing is missing it is the same.
    const { records: kept } = await later.append("me", [proposal("d", 0, A)]);
    const same = followed(later, kept[0]!.revision, kept[0]);
    await waitFor("what is there", () => same.current);
    expect([same.renewed, same.stretches]).toEqual([[], []]);
  });
});

describe.skipIf(noEtcd !== undefined)("three members of etcd", () => {
  test("any of them may be killed, or stop answering, while others write and read", async () => {
    await using engine = await startEtcd({ members: 3 });
    const name = freshName();
    const [mine, theirs] = [await openLedger(engine, name), await openLedger(engine, name)];
    const told = followed(theirs);
    beating(theirs, "m");
    let written = 0;
    const write = async () => revisionOf(await mine.append("me", [proposal(`f${written++}`, 0, A)]));
    const arrives = (what: string) => waitFor(what, () => told.paths.includes(`f${written - 1}`));
    await write();
    await arrives("the first");
    for (const member of [0, 1, 2]) {
      await engine.kill(member);
      await untilDone(write);
      await arrives(`what was written without member ${member}`);
      await engine.restart(member);
    }
    // A connection to one that is stopped stays open: nothing but silence tells.
    for (const member of [0, 1, 2]) {
      engine.pause(member);
      await untilDone(write);
      await arrives(`what was written while member ${member} was stopped`);
      engine.resume(member);
      await waitFor("it answers again", () =>
        fetch(`${engine.endpoints[member]}/health`).then(
          ({ ok }) => ok,
          () => false,
        ),
      );
    }
    expectNoGap(told.stretches);
    const newest = (await mine.read(0, LIMIT)).records.map(({ path }) => path);
    expect([...told.paths].sort()).toEqual([...newest].sort());
    expect(new Set(told.paths).size).toBe(told.paths.length);
  });

  test("one that is left without the others answers nothing, and whoever follows it is told", async () => {
    await using engine = await startEtcd({ members: 3 });
    const name = freshName();
    const ledger = await openLedger(engine, name, { patienceMs: 1000, tryMs: 1000 });
    const told = followed(ledger);
    beating(ledger, "m");
    await ledger.append("me", [proposal("a", 0, A)]);
    await waitFor("what is there", () => told.paths.includes("a"));
    const lost = told.lost.length;
    await engine.kill(1);
    await engine.kill(2);
    await waitFor("the loss", () => told.lost.length > lost);
    expect((await failure(ledger.newest("a"))).code).toBe("busy");
    expect((await failure(ledger.append("me", [proposal("b", 0, A)]))).code).toBe("busy");
    await Promise.all([engine.restart(1), engine.restart(2)]);
    await waitFor("the return", () => told.backs);
    await untilDone(() => ledger.append("me", [proposal("b", 0, A)]));
    await waitFor("what comes", () => told.paths.includes("b"));
    expectNoGap(told.stretches);
  });
});

describe.skipIf(noEtcd !== undefined)("etcd's users", () => {
  test("a wrong password is refused, a right one lets in, and a token that has ended is renewed", async () => {
    await using engine = await startEtcd({ password: "right:/@" });
    const name = freshName();
    const as = (user: string, password: string) =>
      engine.url(name).replace("//", `//${user}:${encodeURIComponent(password)}@`);
    const wrong = await failure(ledgerAt(parseCluster(as("root", "wrong"))).open());
    expect(wrong.code).toBe("denied");
    expect(wrong.message).toContain('etcd does not let the user "root" in');
    expect(wrong.message).not.toContain("wrong");
    expect((await failure(ledgerAt(parseCluster(engine.url(name), {})).open())).code).toBe("denied");
    const ledger = ledgerAt(parseCluster(as("root", "right:/@")));
    await ledger.open();
    const told = followed(ledger);
    beating(ledger, "m");
    await ledger.append("me", [proposal("a", 0, A)]);
    await waitFor("what is there", () => told.paths.includes("a"));
    // A member forgets the tokens that it has given when it ends.
    await engine.kill(0);
    await engine.restart(0);
    const { records } = await untilDone(() => ledger.append("me", [proposal("b", 0, A)]));
    expect((await ledger.newest("b"))!.origin).toBe(records[0]?.origin ?? "me");
    await waitFor("what comes", () => told.paths.includes("b"));
  });

  test("who names a user where etcd asks nobody is let in", async () => {
    const ledger = ledgerAt(parseCluster(shared.url(freshName()).replace("//", "//ann:any@")));
    await ledger.open();
    const told = followed(ledger);
    await ledger.append("me", [proposal("a", 0, A)]);
    await waitFor("what is there", () => told.paths.includes("a"));
  });
});

describe.skipIf(noEtcd !== undefined || !hasOpenssl)("etcd by TLS", () => {
  test("with its authority, and only so", async () => {
    await using engine = await startEtcd({ tls: true });
    const name = freshName();
    const url = engine.url(name).replace("etcd:", "etcds:");
    const at = (text: string, ca?: string) =>
      ledgerAt(parseCluster(text, ca === undefined ? {} : { REPRISE_ETCD_CACERT: ca }), { patienceMs: 100 });
    const ledger = at(url, authority());
    await ledger.open();
    const told = followed(ledger);
    await ledger.append("me", [proposal("a", 0, A)]);
    await waitFor("what is there", () => told.paths.includes("a"));
    for (const ca of [undefined, authority("otherRoot")]) {
      const error = await failure(at(url, ca).open());
      expect([error.code, error.message]).toEqual([
        "insecure",
        expect.stringContaining("its certificate is not accepted"),
      ]);
    }
    const clear = await failure(at(engine.url(name)).open());
    expect(clear.message).toContain("with TLS it is etcds://");
    // And the other way round.
    const plain = await failure(at(shared.url(name).replace("etcd:", "etcds:"), authority()).open());
    expect(plain.message).toContain("without TLS it is etcd://");
  });
});

/** Again where the outcome is not known. */
async function untilDone<T>(work: () => Promise<T>): Promise<T> {
  for (;;) {
    try {
      return await work();
    } catch (error) {
      if ((error as RepriseError).code !== "busy") throw error;
    }
  }
}

type Fate =
  | "pass"
  /** It never gets there. */
  | "silent"
  /** It is carried out, and nobody is told. */
  | "swallow"
  /** It is carried out when `sendLate` is called. */
  | "late"
  /** Only the first part of the answer comes at once. */
  | "slow";

function once(path: string, fate: Fate): (path: string) => Fate {
  let left = 1;
  return (asked) => (asked === path && left-- > 0 ? fate : "pass");
}

/** Between a ledger and its etcd. */
function proxyOf(engine: Engine) {
  const late: (() => Promise<Response>)[] = [];
  const server = Bun.serve({
    port: 0,
    hostname: "127.0.0.1",
    idleTimeout: 0,
    async fetch(request) {
      const { pathname } = new URL(request.url);
      const body = await request.text();
      const fate = proxy.onRequest(pathname);
      const send = () => fetch(engine.endpoints[0] + pathname, { method: "POST", body, signal: request.signal });
      if (fate === "late") late.push(() => fetch(engine.endpoints[0] + pathname, { method: "POST", body }));
      if (fate === "swallow") await send();
      if (fate !== "pass" && fate !== "slow") return new Promise<Response>(() => {});
      const answer = await send();
      const content = fate === "slow" ? slowed(answer.body!) : answer.body;
      return new Response(content as ReadableStream, { status: answer.status });
    },
  });
  const proxy = {
    onRequest: (_path: string): Fate => "pass",
    cluster: (name: string) => parseCluster(`etcd://127.0.0.1:${server.port}/${name}`),
    async sendLate() {
      for (const send of late.splice(0)) await (await send()).text();
    },
    [Symbol.dispose]: () => void server.stop(true),
  };
  return proxy;
}

/** A wire that stalls for longer than a watch may be silent: the fault, not a wait for anything. */
async function* slowed(body: ReadableStream<Uint8Array>): AsyncGenerator<Uint8Array> {
  let parts = 0;
  for await (const part of body as unknown as AsyncIterable<Uint8Array>) {
    if (parts++ === 1) await Bun.sleep(5000);
    yield part;
  }
}
