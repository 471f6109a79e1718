/**
 * The ledger: what becomes of a proposal, and the log that is kept of it. One suite says what each engine of it does; what
 * is the embedded one's alone comes after it, and what is etcd's in etcd.test.ts.
 */
import { Database } from "bun:sqlite";
import { afterAll, beforeAll, describe, expect, setDefaultTimeout, test } from "bun:test";
import { join } from "node:path";
import { Etcd, parseCluster } from "../etcd.ts";
import { EtcdLedger } from "../etcdledger.ts";
import { Index } from "../index.ts";
import {
  type Appended,
  decide,
  EmbeddedLedger,
  FOLDER,
  GONE,
  type Ledger,
  type Proposal,
  type Record,
  recordOf,
  type Version,
} from "../ledger.ts";
import { noEtcd, startEtcd } from "./engines.ts";
import { TEST_MS, temporaryFolder, waitFor } from "./fixtures.ts";

setDefaultTimeout(TEST_MS);
if (noEtcd) console.log(`skipped: the ledger in etcd: ${noEtcd}`);

const DAY_MS = 24 * 3600 * 1000;
const LIMIT = 100;
const TIME = 1_700_000_000_000_000;
const file = (digit: string, mtime = TIME): Version => ({ kind: "file", size: 1, mtime, sha256: digit.repeat(64) });
const proposal = (path: string, base: number, version: Version) => ({ path, base, version });
const [A, B, C] = [file("a"), file("b"), file("c")];

describe("decide()", () => {
  const made = (revision: number, version: Version, over = "") =>
    ({ path: "a", revision, ...version, origin: "x", over }) satisfies Record;

  test("a change of the newest is taken, of an older one refused", () => {
    expect(decide(undefined, proposal("a", 0, A))).toBeUndefined();
    expect(decide(made(5, A), proposal("a", 5, B))).toBeUndefined();
    expect(decide(made(5, A), proposal("a", 4, B))).toEqual({ refusedFor: 5 });
    expect(decide(made(5, A), proposal("a", 0, B))).toEqual({ refusedFor: 5 });
    expect(decide(made(5, A), proposal("a", 5, GONE))).toBeUndefined();
    expect(decide(made(5, A), proposal("a", 4, GONE))).toEqual({ refusedFor: 5 });
  });

  test("what is the same has its revision already", () => {
    expect(decide(made(5, A), proposal("a", 0, A))).toEqual({ revision: 5 });
    expect(decide(made(5, A), proposal("a", 0, file("a", A.mtime + 1)))).toEqual({ revision: 5 });
    expect(decide(made(5, A), proposal("a", 0, file("a", A.mtime + 2)))).toEqual({ refusedFor: 5 });
    expect(decide(made(5, FOLDER), proposal("a", 0, FOLDER))).toEqual({ revision: 5 });
    expect(decide(made(5, GONE), proposal("a", 0, GONE))).toEqual({ revision: 5 });
    expect(decide(undefined, proposal("a", 3, GONE))).toEqual({ revision: 0 });
  });

  test("a change beats a deletion, but not of just what was deleted", () => {
    expect(decide(made(5, GONE, A.sha256), proposal("a", 0, B))).toBeUndefined();
    expect(decide(made(5, GONE, A.sha256), proposal("a", 0, A))).toEqual({ refusedFor: 5 });
    expect(decide(made(5, GONE, A.sha256), proposal("a", 5, A))).toBeUndefined();
    expect(decide(made(5, GONE), proposal("a", 0, FOLDER))).toBeUndefined();
  });

  test("a record says what it took the place of", () => {
    const record = recordOf(proposal("a", 5, B), 6, "me", made(5, A));
    expect(record).toEqual({ path: "a", revision: 6, ...B, origin: "me", over: A.sha256 });
    expect(recordOf(proposal("a", 0, B), 1, "me", undefined).over).toBe("");
  });
});

/** A ledger that can be opened again, as after its process has ended. */
interface Opened extends AsyncDisposable {
  ledger: Ledger;
  again(): Promise<Ledger>;
}

/** New ones, each another's. */
const engines: { [name: string]: () => Promise<Opened> } = {
  EmbeddedLedger: async () => {
    const folder = temporaryFolder();
    const open = () => new EmbeddedLedger(join(folder.path, "ledger"));
    return opened(open(), async () => open(), folder);
  },
  EtcdLedger: async () => {
    const cluster = parseCluster(etcd.url(`contract-${++clusters}`));
    const open = async () => {
      const ledger = new EtcdLedger(new Etcd(cluster), { store: "folder" });
      await ledger.open();
      return ledger;
    };
    return opened(await open(), open);
  },
};

function opened(first: Ledger, open: () => Promise<Ledger>, folder?: Disposable): Opened {
  let ledger = first;
  return {
    ledger,
    async again() {
      await ledger.close();
      ledger = await open();
      return ledger;
    },
    async [Symbol.asyncDispose]() {
      await ledger.close();
      folder?.[Symbol.dispose]();
    },
  };
}

let etcd: Awaited<ReturnType<typeof startEtcd>>;
let clusters = 0;
beforeAll(async () => {
  if (!noEtcd) etcd = await startEtcd();
});
afterAll(async () => await etcd?.[Symbol.asyncDispose]());

describe.each(Object.keys(engines).filter((name) => name !== "EtcdLedger" || !noEtcd))("Ledger: %s", (engine) => {
  const open = engines[engine]!;

  test("is the same after it was closed, and another's is another", async () => {
    await using one = await open();
    const { records, decisions } = await one.ledger.append("me", [proposal("a", 0, A), proposal("b", 0, B)]);
    const { id } = one.ledger;
    const revision = revisionOf(decisions, 1);
    await one.ledger.join({ node: "n", address: "h:1", revision }, 7);
    const again = await one.again();
    expect(again.id).toBe(id);
    expect(await again.read(0, LIMIT)).toEqual({ after: 0, revision, records });
    expect(again.revision).toBe(revision);
    expect(await again.members()).toEqual([{ node: "n", address: "h:1", revision, seen: 7 }]);
    const { decisions: next } = await again.append("me", [proposal("c", 0, C)]);
    expect(revisionOf(next)).toBeGreaterThan(revision);
    await using other = await open();
    expect(other.ledger.id).not.toBe(id);
    expect((await other.ledger.read(0, LIMIT)).records).toEqual([]);
  });

  test("append() takes a change on the newest, and the same once more as the same", async () => {
    await using one = await open();
    const { ledger } = one;
    const first = [proposal("a", 0, A), proposal("b", 0, B)];
    const { decisions } = await ledger.append("me", first);
    const base = revisionOf(decisions);
    expect(await ledger.append("me", first)).toEqual({ decisions, records: [] });
    const second = revisionOf((await ledger.append("you", [proposal("a", base, C)])).decisions);
    expect(second).toBeGreaterThan(revisionOf(decisions, 1));
    expect(await ledger.append("me", [proposal("a", base, B)])).toEqual({
      decisions: [{ refusedFor: second }],
      records: [],
    });
    expect(ledger.revision).toBe(second);
    expect(await ledger.newest("a")).toEqual({ path: "a", revision: second, ...C, origin: "you", over: A.sha256 });
    expect(await ledger.newest("c")).toBeUndefined();
  });

  test("append() decides in order: of two changes to one path the second meets the first", async () => {
    await using one = await open();
    const { ledger } = one;
    const { decisions, records } = await ledger.append("me", [
      proposal("a", 0, A),
      proposal("a", 0, B),
      proposal("b", 0, B),
      proposal("a", 0, A),
    ]);
    const [a, b] = [revisionOf(decisions), revisionOf(decisions, 2)];
    expect(decisions).toEqual([{ revision: a }, { refusedFor: a }, { revision: b }, { revision: a }]);
    expect(records.map(({ path, revision }) => [path, revision])).toEqual([
      ["a", a],
      ["b", b],
    ]);
    const deleted = await ledger.append("me", [proposal("a", a, GONE), proposal("a", 0, A), proposal("a", 0, C)]);
    const [gone, made] = [revisionOf(deleted.decisions), revisionOf(deleted.decisions, 2)];
    // Of just what was deleted it is no change; another is.
    expect(deleted.decisions).toEqual([{ revision: gone }, { refusedFor: gone }, { revision: made }]);
    expect(made).toBeGreaterThan(gone);
  });

  test("append() takes a deletion of nothing as done, and a change over a deletion", async () => {
    await using one = await open();
    const { ledger } = one;
    expect(await ledger.append("me", [proposal("a", 0, GONE)])).toEqual({ decisions: [{ revision: 0 }], records: [] });
    const folder = revisionOf((await ledger.append("me", [proposal("d", 0, FOLDER)])).decisions);
    const gone = revisionOf((await ledger.append("me", [proposal("d", folder, GONE)])).decisions);
    const { records } = await ledger.append("me", [proposal("d", 0, B)]);
    expect(records).toEqual([{ path: "d", revision: expect.any(Number), ...B, origin: "me", over: "" }]);
    expect(records[0]!.revision).toBeGreaterThan(gone);
  });

  test("appends side by side: each base has one winner, and the rest know whom", async () => {
    await using one = await open();
    const { ledger } = one;
    const paths = Array.from({ length: 30 }, (_, at) => `p${at}`);
    const appends = await Promise.all(
      [A, B, C].map(async (version, at) =>
        ledger.append(
          `node${at}`,
          paths.map((path) => proposal(path, 0, version)),
        ),
      ),
    );
    for (const [at, path] of paths.entries()) {
      const { revision, origin } = (await ledger.newest(path))!;
      const winner = Number(origin.slice("node".length));
      const decided = appends.map(({ decisions }) => decisions[at]!);
      expect(decided).toEqual([0, 1, 2].map((node) => (node === winner ? { revision } : { refusedFor: revision })));
    }
    const made = appends.flatMap(({ records }) => records.map(({ path }) => path));
    expect(made.sort()).toEqual([...paths].sort());
  });

  test("any path is one, and comes back as it was", async () => {
    await using one = await open();
    const { ledger } = one;
    const paths = ["a b/c", "ä/ü.txt", "%2F", "records/ledger", "\ufeffmark", "\u{1f600}", "x".repeat(255), 'q\t"\\'];
    const { records } = await ledger.append(
      "me",
      paths.map((path) => proposal(path, 0, A)),
    );
    expect(records.map(({ path }) => path)).toEqual(paths);
    expect((await ledger.read(0, LIMIT)).records).toEqual(records);
    for (const [at, path] of paths.entries()) expect(await ledger.newest(path)).toEqual(records[at]!);
  });

  test("read() gives the newest of each path, in order and so many at a time", async () => {
    await using one = await open();
    const { ledger } = one;
    const [a, b, c, d] = await singly(ledger, ["a", "b", "c", "d"]);
    const changed = revisionOf((await ledger.append("me", [proposal("b", b, B)])).decisions);
    const read = async (after: number, limit: number) => {
      const { records, revision } = await ledger.read(after, limit);
      return [records.map(({ path }) => path).join(""), revision];
    };
    expect([await read(0, 2), await read(c, 2), await read(changed, 2)]).toEqual([
      ["ac", c],
      ["db", changed],
      ["", changed],
    ]);
    expect([await read(0, 4), await read(0, 5), await read(d, 1), await read(a, 1)]).toEqual([
      ["acdb", changed],
      ["acdb", changed],
      ["b", changed],
      ["c", c],
    ]);
  });

  test("read() never ends between records of one revision: in pieces of any size it gives all, once", async () => {
    await using one = await open();
    const { ledger } = one;
    const proposals = Array.from({ length: 250 }, (_, at) => proposal(`f${at}`, 0, A));
    await ledger.append("me", proposals);
    for (const limit of [1, 7, 99, 100, 101, 250, 251]) {
      const paths: string[] = [];
      let after = 0;
      for (;;) {
        const { records, revision } = await ledger.read(after, limit);
        paths.push(...records.map(({ path }) => path));
        if (revision === after) break;
        after = revision;
      }
      expect(paths).toEqual(proposals.map(({ path }) => path));
    }
  });

  test("records() gives what is newer, in order", async () => {
    await using one = await open();
    const { ledger } = one;
    const [a, b] = await singly(ledger, ["a", "b"]);
    const paths = async (after: number, limit: number) =>
      (await ledger.records(after, limit)).map(({ path, revision }) => [path, revision]);
    expect(await paths(0, LIMIT)).toEqual([
      ["a", a],
      ["b", b],
    ]);
    expect([await paths(0, 1), await paths(a, LIMIT), await paths(b, LIMIT)]).toEqual([[["a", a]], [["b", b]], []]);
  });

  test("watch() calls back when there is something newer", async () => {
    await using one = await open();
    const { ledger } = one;
    const heard: number[] = [];
    await ledger.watch(() => heard.push(ledger.revision));
    const [a] = await singly(ledger, ["a"]);
    await waitFor("news of the first", () => heard.includes(a));
    await ledger.append("me", [proposal("a", 0, A)]);
    const [b] = await singly(ledger, ["b"]);
    await waitFor("news of the second", () => heard.includes(b));
    // And not when there is nothing.
    expect(new Set(heard)).toEqual(new Set([a, b]));
  });

  test("renew() begins anew under another name, and it stays so", async () => {
    await using one = await open();
    const { ledger } = one;
    const { id } = ledger;
    const [a] = await singly(ledger, ["a"]);
    await ledger.renew();
    const renewed = ledger.id;
    expect(renewed).not.toBe(id);
    expect([(await ledger.read(0, LIMIT)).records, await ledger.newest("a")]).toEqual([[], undefined]);
    const [again] = await singly(ledger, ["a"]);
    expect(again).toBeGreaterThan(a);
    expect((await one.again()).id).toBe(renewed);
  });

  describe("prune()", () => {
    /** Three made, one after the other, and the first deleted. */
    async function withDeletion(ledger: Ledger): Promise<{ [name in "a" | "b" | "c" | "gone"]: number }> {
      const [a, b, c] = await singly(ledger, ["a", "b", "c"]);
      const gone = revisionOf((await ledger.append("me", [proposal("a", a, GONE)])).decisions);
      return { a: a, b: b, c: c, gone };
    }
    const note = (ledger: Ledger, node: string, revision: number, seen = Date.now()) =>
      ledger.join({ node, address: `${node}:1`, revision }, seen);

    test("a deletion is kept until all have it", async () => {
      await using one = await open();
      const { ledger } = one;
      const { b, c, gone } = await withDeletion(ledger);
      await note(ledger, "n", gone);
      await note(ledger, "m", c);
      await ledger.prune(gone);
      expect([(await ledger.newest("a"))?.kind, ledger.pruned]).toEqual(["gone", 0]);
      await note(ledger, "m", gone);
      await ledger.prune(c);
      expect((await ledger.newest("a"))?.kind).toBe("gone");
      await ledger.prune(gone);
      expect([await ledger.newest("a"), ledger.pruned]).toEqual([undefined, gone]);
      expect((await ledger.newest("b"))?.revision).toBe(b);
    });

    test("who comes from before that gets a snapshot, in parts that go on; others what is new", async () => {
      await using one = await open();
      const { ledger } = one;
      const { b, c, gone } = await withDeletion(ledger);
      await ledger.prune(gone);
      const paths = async (after: number, limit: number, isWithin?: boolean) => {
        const { records, snapshot, ...stretch } = await ledger.read(after, limit, isWithin);
        return { ...stretch, paths: records.map(({ path }) => path).join(""), snapshot };
      };
      expect(await paths(c, 9)).toEqual({ after: 0, revision: gone, paths: "bc", snapshot: "complete" });
      expect(await paths(c, 1)).toEqual({ after: 0, revision: b, paths: "b", snapshot: "part" });
      expect(await paths(b, 1, true)).toEqual({ after: b, revision: c, paths: "c", snapshot: "part" });
      expect(await paths(c, 1, true)).toEqual({ after: c, revision: gone, paths: "", snapshot: "complete" });
      expect(await paths(gone, 9)).toEqual({ after: gone, revision: gone, paths: "", snapshot: undefined });
      const [d] = await singly(ledger, ["d"]);
      expect(await paths(gone, 9)).toEqual({ after: gone, revision: d, paths: "d", snapshot: undefined });
    });

    test("what was changed again since is no deletion any more", async () => {
      await using one = await open();
      const { ledger } = one;
      const { gone } = await withDeletion(ledger);
      const again = revisionOf((await ledger.append("me", [proposal("a", gone, C)])).decisions);
      await ledger.prune(again);
      expect(await ledger.newest("a")).toEqual({ path: "a", revision: again, ...C, origin: "me", over: "" });
    });

    test("a member that was not seen for a month is waited for no more", async () => {
      await using one = await open();
      const { ledger } = one;
      const { a, gone } = await withDeletion(ledger);
      const now = Date.now();
      await note(ledger, "away", a, now - 30 * DAY_MS);
      await ledger.prune(gone, now);
      expect([(await ledger.members()).length, (await ledger.newest("a"))?.kind]).toEqual([1, "gone"]);
      await ledger.prune(gone, now + 1);
      expect([(await ledger.members()).length, await ledger.newest("a")]).toEqual([0, undefined]);
    });

    test("what was pruned is remembered, and its name can be used again", async () => {
      await using one = await open();
      const { a, c, gone } = await withDeletion(one.ledger);
      await one.ledger.prune(gone);
      const again = await one.again();
      expect((await again.read(c, LIMIT)).snapshot).toBe("complete");
      expect([again.pruned, again.revision]).toEqual([gone, expect.any(Number)]);
      const { decisions } = await again.append("me", [proposal("a", a, B)]);
      expect(revisionOf(decisions)).toBeGreaterThan(gone);
    });
  });
});

/** Each in a revision of its own. */
async function singly<const Paths extends readonly string[]>(
  ledger: Ledger,
  paths: Paths,
): Promise<{ -readonly [At in keyof Paths]: number }> {
  const revisions: number[] = [];
  for (const path of paths) revisions.push(revisionOf((await ledger.append("me", [proposal(path, 0, A)])).decisions));
  return revisions as { -readonly [At in keyof Paths]: number };
}

function revisionOf(decisions: Appended["decisions"], at = 0): number {
  const decision = decisions[at]!;
  if (!("revision" in decision)) throw new Error(`refused for ${decision.refusedFor}`);
  return decision.revision;
}

describe("EmbeddedLedger", () => {
  const open = (folder: { path: string }) => new EmbeddedLedger(join(folder.path, "ledger"));

  test("counts revisions one by one, also over a prune", () => {
    using folder = temporaryFolder();
    const first = open(folder);
    const all: Proposal[] = [proposal("a", 0, A), proposal("a", 0, B), proposal("a", 1, C), proposal("b", 0, B)];
    expect(first.append("me", all).decisions).toEqual([
      { revision: 1 },
      { refusedFor: 1 },
      { revision: 2 },
      { revision: 3 },
    ]);
    first.append("me", [proposal("b", 3, GONE)]);
    first.prune(4);
    first.close();
    const second = open(folder);
    expect([second.pruned, second.revision]).toEqual([4, 4]);
    expect(second.append("me", [proposal("c", 0, C)]).decisions).toEqual([{ revision: 5 }]);
    second.close();
  });

  test("append() is whole or not at all", () => {
    using folder = temporaryFolder();
    const ledger = open(folder);
    ledger.append("me", [proposal("a", 0, A)]);
    const broken = { ...B, sha256: null as unknown as string };
    expect(() => ledger.append("me", [proposal("b", 0, B), proposal("c", 0, broken)])).toThrow();
    expect([ledger.revision, ledger.newest("b")]).toEqual([1, undefined]);
    expect(ledger.append("me", [proposal("b", 0, B)]).decisions).toEqual([{ revision: 2 }]);
    ledger.close();
  });

  test("together() several appends are one transaction", () => {
    using folder = temporaryFolder();
    const ledger = open(folder);
    const append = (path: string) => ledger.append("me", [proposal(path, 0, A)]);
    const both = () => {
      append("a");
      append("b");
      throw new Error("no");
    };
    expect(() => ledger.together(both)).toThrow("no");
    expect([ledger.revision, ledger.newest("a"), ledger.newest("b")]).toEqual([0, undefined, undefined]);
    ledger.together(() => [append("a"), append("b")]);
    expect(ledger.records(0, LIMIT).map(({ path, revision }) => [path, revision])).toEqual([
      ["a", 1],
      ["b", 2],
    ]);
    ledger.close();
  });

  test("is on disk before append() returns", () => {
    using folder = temporaryFolder();
    const ledger = open(folder);
    ledger.append("me", [proposal("a", 0, A)]);
    // Another connection sees what is committed, and what another process would find after a kill.
    const other = new Database(join(folder.path, "ledger"), { readonly: true });
    expect(other.query("SELECT path, revision FROM records").all()).toEqual([{ path: "a", revision: 1 }]);
    other.close();
    ledger.close();
  });
});

describe("Index, as a log", () => {
  test("records() never ends between records of one revision", () => {
    const index = new Index(":memory:");
    const revisions: { [path: string]: number } = { a: 2, b: 2, c: 2, d: 3, e: 5, f: 5, none: 0 };
    for (const [path, base] of Object.entries(revisions))
      index.set({ path, base, known: A, seen: A, etag: "", sent: undefined, target: undefined, passed: [] });
    const paths = (after: number, limit: number) =>
      index
        .records(after, limit)
        .map(({ path }) => path)
        .join("");
    expect([paths(0, 1), paths(0, 3), paths(0, 4), paths(0, 5)]).toEqual(["abc", "abc", "abcd", "abcdef"]);
    expect([paths(2, 1), paths(3, 1), paths(0, LIMIT), paths(5, 1)]).toEqual(["d", "ef", "abcdef", ""]);
    index.close();
  });
});
