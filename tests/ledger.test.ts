/** The ledger: what becomes of a proposal, and the log that the master keeps of it. */
import { Database } from "bun:sqlite";
import { describe, expect, test } from "bun:test";
import { join } from "node:path";
import { decide, EmbeddedLedger, FOLDER, GONE, type Record, recordOf, type Version } from "../ledger.ts";
import { temporaryFolder } from "./fixtures.ts";

const DAY_MS = 24 * 3600 * 1000;
const LIMIT = 100;
const file = (sha256: string, mtime = 1_700_000_000_000_000): Version => ({ kind: "file", size: 1, mtime, sha256 });
const proposal = (path: string, base: number, version: Version) => ({ path, base, version });
const [A, B, C] = [file("A"), file("B"), file("C")];

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
    expect(decide(made(5, A), proposal("a", 0, file("A", A.mtime + 1)))).toEqual({ revision: 5 });
    expect(decide(made(5, A), proposal("a", 0, file("A", A.mtime + 2)))).toEqual({ refusedFor: 5 });
    expect(decide(made(5, FOLDER), proposal("a", 0, FOLDER))).toEqual({ revision: 5 });
    expect(decide(made(5, GONE), proposal("a", 0, GONE))).toEqual({ revision: 5 });
    expect(decide(undefined, proposal("a", 3, GONE))).toEqual({ revision: 0 });
  });

  test("a change beats a deletion, but not of just what was deleted", () => {
    expect(decide(made(5, GONE, "A"), proposal("a", 0, B))).toBeUndefined();
    expect(decide(made(5, GONE, "A"), proposal("a", 0, A))).toEqual({ refusedFor: 5 });
    expect(decide(made(5, GONE, "A"), proposal("a", 5, A))).toBeUndefined();
    expect(decide(made(5, GONE), proposal("a", 0, FOLDER))).toBeUndefined();
  });

  test("a record says what it took the place of", () => {
    const record = recordOf(proposal("a", 5, B), 6, "me", made(5, A));
    expect(record).toEqual({ path: "a", revision: 6, ...B, origin: "me", over: "A" });
    expect(recordOf(proposal("a", 0, B), 1, "me", undefined).over).toBe("");
  });
});

describe("EmbeddedLedger", () => {
  const open = (folder: { path: string }) => new EmbeddedLedger(join(folder.path, "ledger"));

  test("is the same after it was closed", () => {
    using folder = temporaryFolder();
    const first = open(folder);
    const { records } = first.append("me", [proposal("a", 0, A), proposal("b", 0, B)]);
    const { id } = first;
    first.join({ node: "n", address: "h:1", revision: 1 }, 7);
    first.close();
    const second = open(folder);
    expect([second.id, second.revision]).toEqual([id, 2]);
    expect(second.read(0, LIMIT)).toEqual({ after: 0, revision: 2, records });
    expect(second.members()).toEqual([{ node: "n", address: "h:1", revision: 1, seen: 7 }]);
    expect(second.append("me", [proposal("c", 0, C)]).decisions).toEqual([{ revision: 3 }]);
    second.close();
    using other = temporaryFolder();
    const third = open(other);
    expect(third.id).not.toBe(id);
    third.close();
  });

  test("append() takes a change on the newest, and the same once more as the same", () => {
    const ledger = new EmbeddedLedger(":memory:");
    const first = [proposal("a", 0, A), proposal("b", 0, B)];
    expect(ledger.append("me", first).decisions).toEqual([{ revision: 1 }, { revision: 2 }]);
    expect(ledger.append("me", first)).toEqual({ decisions: [{ revision: 1 }, { revision: 2 }], records: [] });
    expect(ledger.append("you", [proposal("a", 1, C)]).decisions).toEqual([{ revision: 3 }]);
    expect(ledger.append("me", [proposal("a", 1, B)])).toEqual({ decisions: [{ refusedFor: 3 }], records: [] });
    expect(ledger.revision).toBe(3);
    expect(ledger.newest("a")).toEqual({ path: "a", revision: 3, ...C, origin: "you", over: "A" });
    expect(ledger.newest("c")).toBeUndefined();
    ledger.close();
  });

  test("append() decides in order: of two changes to one path the second meets the first", () => {
    const ledger = new EmbeddedLedger(":memory:");
    const { decisions } = ledger.append("me", [proposal("a", 0, A), proposal("a", 0, B), proposal("a", 1, C)]);
    expect(decisions).toEqual([{ revision: 1 }, { refusedFor: 1 }, { revision: 2 }]);
    ledger.close();
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

  test("read() gives the newest of each path, in order and so many at a time", () => {
    const ledger = new EmbeddedLedger(":memory:");
    for (const path of ["a", "b", "c", "d"]) ledger.append("me", [proposal(path, 0, A)]);
    ledger.append("me", [proposal("b", 2, B)]);
    const read = (after: number, limit: number) => {
      const { records, revision } = ledger.read(after, limit);
      return [records.map(({ path }) => path).join(""), revision];
    };
    expect([read(0, 2), read(3, 2), read(5, 2)]).toEqual([
      ["ac", 3],
      ["db", 5],
      ["", 5],
    ]);
    expect([read(0, 4), read(0, 5), read(4, 1)]).toEqual([
      ["acdb", 5],
      ["acdb", 5],
      ["b", 5],
    ]);
    ledger.close();
  });
});

describe("EmbeddedLedger prune()", () => {
  /** Revisions 1 to 3 made, and 1 deleted with 4. */
  function withDeletion(): EmbeddedLedger {
    const ledger = new EmbeddedLedger(":memory:");
    ledger.append("me", [proposal("a", 0, A), proposal("b", 0, B), proposal("c", 0, C), proposal("a", 1, GONE)]);
    return ledger;
  }
  const note = (ledger: EmbeddedLedger, node: string, revision: number, seen = Date.now()) =>
    ledger.join({ node, address: `${node}:1`, revision }, seen);

  test("a deletion is kept until all have it", () => {
    const ledger = withDeletion();
    note(ledger, "n", 4);
    note(ledger, "m", 3);
    ledger.prune(4);
    expect([ledger.newest("a")?.kind, ledger.pruned]).toEqual(["gone", 0]);
    note(ledger, "m", 4);
    ledger.prune(3);
    expect(ledger.newest("a")?.kind).toBe("gone");
    ledger.prune(4);
    expect([ledger.newest("a"), ledger.pruned]).toEqual([undefined, 4]);
    expect(ledger.newest("b")?.revision).toBe(2);
    ledger.close();
  });

  test("who comes from before that gets a snapshot, in parts that go on; others what is new", () => {
    const ledger = withDeletion();
    ledger.prune(4);
    const paths = (after: number, limit: number, isWithin?: boolean) => {
      const { records, snapshot, ...stretch } = ledger.read(after, limit, isWithin);
      return { ...stretch, paths: records.map(({ path }) => path).join(""), snapshot };
    };
    expect(paths(3, 9)).toEqual({ after: 0, revision: 4, paths: "bc", snapshot: "complete" });
    expect(paths(3, 1)).toEqual({ after: 0, revision: 2, paths: "b", snapshot: "part" });
    expect(paths(2, 1, true)).toEqual({ after: 2, revision: 3, paths: "c", snapshot: "part" });
    expect(paths(3, 1, true)).toEqual({ after: 3, revision: 4, paths: "", snapshot: "complete" });
    expect(paths(4, 9)).toEqual({ after: 4, revision: 4, paths: "", snapshot: undefined });
    ledger.append("me", [proposal("d", 0, A)]);
    expect(paths(4, 9)).toEqual({ after: 4, revision: 5, paths: "d", snapshot: undefined });
    ledger.close();
  });

  test("a member that was not seen for a month is waited for no more", () => {
    const ledger = withDeletion();
    const now = Date.now();
    note(ledger, "away", 1, now - 30 * DAY_MS);
    ledger.prune(4, now);
    expect([ledger.members().length, ledger.newest("a")?.kind]).toEqual([1, "gone"]);
    ledger.prune(4, now + 1);
    expect([ledger.members().length, ledger.newest("a")]).toEqual([0, undefined]);
    ledger.close();
  });

  test("what was pruned is remembered, and its name can be used again", () => {
    using folder = temporaryFolder();
    const path = join(folder.path, "ledger");
    const first = new EmbeddedLedger(path);
    first.append("me", [proposal("a", 0, A), proposal("a", 1, GONE)]);
    first.prune(2);
    first.close();
    const second = new EmbeddedLedger(path);
    expect([second.pruned, second.revision]).toEqual([2, 2]);
    expect(second.read(1, LIMIT).snapshot).toBe("complete");
    expect(second.append("me", [proposal("a", 1, B)]).decisions).toEqual([{ revision: 3 }]);
    second.close();
  });
});
