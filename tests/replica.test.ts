/** What a member makes of one event, case by case; simulation.test.ts has them in all orders. */
import { describe, expect, test } from "bun:test";
import { FOLDER, GONE, type Record, type Version } from "../ledger.ts";
import { conflictName, type Effect, type Event, isWanted, type State, step } from "../replica.ts";
import { MapEntries } from "./world.ts";

const file = (sha256: string, mtime = 1_700_000_000_000_000): Version => ({ kind: "file", size: 1, mtime, sha256 });
const record = (revision: number, path: string, version: Version, over = "", origin = "other"): Record => {
  return { path, revision, ...version, origin, over };
};
const seen = (
  path: string,
  version: Version,
  etag = version.kind === "gone" ? "" : `etag-${version.sha256}`,
): Event => {
  return { kind: "seen", path, version, etag };
};
const stretch = (after: number, ...records: Record[]): Event => {
  return { kind: "stretch", after, revision: records.at(-1)?.revision ?? after, records };
};

/** A member that is online, and what its last event made it do. */
class Member {
  readonly state: State = { node: "me", entries: new MapEntries(), cursor: 0, online: true, snapshot: undefined };

  take(event: Event): Effect[] {
    return step(this.state, event);
  }

  /** It has a record, and the tree what that says. */
  has(made: Record): this {
    this.take(stretch(this.state.cursor, made));
    this.take({ kind: "placed", record: made, etag: `etag-${made.sha256}` });
    return this;
  }

  entry(path = "a") {
    return this.state.entries.get(path);
  }
}

const propose = (path: string, base: number, version: Version): Effect => ({ kind: "propose", path, base, version });
const place = (made: Record, etag: string): Effect => ({ kind: "place", record: made, etag });
const aside = (path: string, version: Version): Effect => {
  return { kind: "aside", path, etag: `etag-${version.sha256}`, to: conflictName(path, "me", version) };
};
const [A, B, C] = [file("A"), file("B"), file("C")];

describe("step() proposals", () => {
  test("a change is proposed on what the tree goes back to", () => {
    expect(new Member().take(seen("a", A))).toEqual([propose("a", 0, A)]);
    expect(new Member().has(record(5, "a", A)).take(seen("a", B))).toEqual([propose("a", 5, B)]);
    expect(new Member().has(record(5, "a", A)).take(seen("a", GONE))).toEqual([propose("a", 5, GONE)]);
  });

  test("what is seen again is proposed once, and a later change after the answer", () => {
    const me = new Member();
    me.take(seen("a", A));
    expect(me.take(seen("a", A))).toEqual([]);
    expect(me.take(seen("a", B))).toEqual([]);
    expect(me.take({ kind: "decided", path: "a", version: A, revision: 3 })).toEqual([propose("a", 3, B)]);
  });

  test("the record of its own proposal is its answer, and nothing to be placed", () => {
    const me = new Member();
    me.take(seen("a", A));
    expect(me.take(stretch(0, record(1, "a", A, "", "me")))).toEqual([]);
    expect(me.entry()).toMatchObject({ base: 1, sent: undefined, target: undefined });
    expect(me.take({ kind: "decided", path: "a", version: A, revision: 1 })).toEqual([]);
  });

  test("the record of its own proposal, after the tree has changed once more", () => {
    const me = new Member();
    me.take(seen("a", A));
    me.take(seen("a", B));
    expect(me.take(stretch(0, record(1, "a", A, "", "me")))).toEqual([propose("a", 1, B)]);
  });

  test("offline nothing is proposed; online what was sent is sent again, not what came after it", () => {
    const me = new Member();
    me.take(seen("a", A));
    me.take({ kind: "offline" });
    expect(me.take(seen("a", B))).toEqual([]);
    expect(me.take(seen("b", C))).toEqual([]);
    const again = me.take({ kind: "online" });
    expect(again).toEqual([propose("a", 0, A), propose("b", 0, C), { kind: "read", after: 0 }]);
  });

  test("an answer to another version is none", () => {
    const me = new Member();
    me.take(seen("a", A));
    expect(me.take({ kind: "decided", path: "a", version: B, revision: 3 })).toEqual([]);
    expect(me.take({ kind: "refused", path: "a", version: B, refusedFor: 3 })).toEqual([]);
    expect(me.entry()).toMatchObject({ base: 0, sent: A });
  });

  test("what was refused is proposed on nothing until the record comes that stands against it", () => {
    const me = new Member().has(record(1, "a", A));
    me.take(seen("a", B));
    expect(me.take({ kind: "refused", path: "a", version: B, refusedFor: 2 })).toEqual([]);
    expect(me.take(stretch(1, record(2, "a", C, "A")))).toEqual([aside("a", B)]);
  });

  test("a microsecond is no change", () => {
    const me = new Member().has(record(1, "a", A));
    expect(me.take(seen("a", { ...A, mtime: A.mtime + 1 }, "other"))).toEqual([]);
    expect(me.take(seen("a", { ...A, mtime: A.mtime + 3 }))).toHaveLength(1);
  });
});

describe("step() records", () => {
  test("one is placed over what the index knows of", () => {
    const made = record(1, "a", A);
    const me = new Member();
    expect(me.take(stretch(0, made))).toEqual([place(made, "")]);
    expect(me.take({ kind: "placed", record: made, etag: "e" })).toEqual([]);
    const next = record(2, "a", B, "A");
    expect(me.take(stretch(1, next))).toEqual([place(next, "e")]);
  });

  test("what the tree has already is adopted", () => {
    const me = new Member();
    me.take({ kind: "offline" });
    me.take(seen("a", A));
    expect(me.take(stretch(0, record(1, "a", A)))).toEqual([]);
    expect(me.entry()).toMatchObject({ base: 1, target: undefined });
    expect(me.take({ kind: "online" })).toEqual([{ kind: "read", after: 1 }]);
  });

  test("two changes: what the tree has goes aside, and is then a change of its own", () => {
    const me = new Member().has(record(1, "a", A));
    me.take({ kind: "offline" });
    me.take(seen("a", B));
    const winner = record(2, "a", C, "A");
    expect(me.take(stretch(1, winner))).toEqual([aside("a", B)]);
    expect(me.take(seen("a", GONE))).toEqual([place(winner, "")]);
    me.take({ kind: "online" });
    const name = conflictName("a", "me", B);
    expect(me.take(seen(name, B))).toEqual([propose(name, 0, B)]);
  });

  test("a change by somebody who had what is here is no conflict", () => {
    const me = new Member();
    me.take({ kind: "offline" });
    me.take(seen("a", A));
    const next = record(2, "a", B, "A");
    expect(me.take(stretch(0, next))).toEqual([place(next, "etag-A")]);
  });

  test("another time of the same content is no conflict", () => {
    const me = new Member().has(record(1, "a", A));
    me.take({ kind: "offline" });
    me.take(seen("a", file("A", 5)));
    const next = record(2, "a", file("A", 9), "A");
    expect(me.take(stretch(1, next))).toEqual([place(next, "etag-A")]);
  });

  test("a change here beats a deletion elsewhere, and is proposed on it", () => {
    const me = new Member().has(record(1, "a", A));
    me.take({ kind: "offline" });
    me.take(seen("a", B));
    expect(me.take(stretch(1, record(2, "a", GONE, "A")))).toEqual([]);
    expect(me.take({ kind: "online" })).toEqual([propose("a", 2, B), { kind: "read", after: 2 }]);
  });

  test("a change elsewhere beats a deletion here", () => {
    const me = new Member().has(record(1, "a", A));
    me.take({ kind: "offline" });
    me.take(seen("a", GONE));
    const next = record(2, "a", B, "A");
    expect(me.take(stretch(1, next))).toEqual([place(next, "")]);
  });

  test("a deletion of what is here is done, and one of both is none", () => {
    const me = new Member().has(record(1, "a", A)).has(record(2, "b", A));
    const gone = record(3, "a", GONE, "A");
    expect(me.take(stretch(2, gone))).toEqual([place(gone, "etag-A")]);
    me.take({ kind: "offline" });
    me.take(seen("b", GONE));
    expect(me.take(stretch(3, record(4, "b", GONE, "A")))).toEqual([]);
  });

  test("what is under way has its answer first: it may be taken after a deletion", () => {
    const me = new Member().has(record(1, "a", A));
    const touched = file("A", 5);
    me.take(seen("a", touched));
    expect(me.take(stretch(1, record(2, "a", B, "A"), record(3, "a", GONE, "B")))).toEqual([]);
    expect(me.take({ kind: "decided", path: "a", version: touched, revision: 4 })).toEqual([]);
    expect(me.entry()).toMatchObject({ base: 4, seen: touched, target: undefined });
  });

  test("what is under way has its answer first, also where the tree has meanwhile what came before it", () => {
    const me = new Member().has(record(1, "a", A));
    me.take(seen("a", B));
    me.take(seen("a", C));
    expect(me.take(stretch(1, record(2, "a", C, "A"), record(3, "a", GONE, "C")))).toEqual([]);
    // The ledger had B after the deletion: what the tree has is then a change of that.
    expect(me.take({ kind: "decided", path: "a", version: B, revision: 4 })).toEqual([propose("a", 4, C)]);
  });

  test("what is under way keeps its base, and the tree what the newest says until it is refused", () => {
    const me = new Member().has(record(1, "a", A));
    me.take(seen("a", B));
    me.take(seen("a", C));
    expect(me.take(stretch(1, record(2, "a", C, "A")))).toEqual([]);
    expect(me.take({ kind: "online" })).toEqual([propose("a", 1, B), { kind: "read", after: 2 }]);
    expect(me.take({ kind: "refused", path: "a", version: B, refusedFor: 2 })).toEqual([]);
    expect(me.entry()).toMatchObject({ base: 2, sent: undefined, target: undefined });
  });

  test("what is under way is refused: then the record that came before is placed", () => {
    const me = new Member().has(record(1, "a", A));
    const touched = file("A", 5);
    me.take(seen("a", touched));
    const gone = record(3, "a", GONE, "A");
    expect(me.take(stretch(1, gone))).toEqual([]);
    const refused: Event = { kind: "refused", path: "a", version: touched, refusedFor: 3 };
    expect(me.take(refused)).toEqual([place(gone, "etag-A")]);
  });

  test("the tree is not what was thought: it is looked at, and what is to be placed is said anew", () => {
    const me = new Member().has(record(1, "a", A));
    const next = record(2, "a", B, "A");
    me.take(stretch(1, next));
    expect(me.take(seen("a", A, "other"))).toEqual([place(next, "other")]);
    expect(me.take(seen("a", C))).toEqual([aside("a", C)]);
  });

  test("an old record changes nothing, in whatever order", () => {
    const me = new Member().has(record(2, "a", B));
    expect(me.take(stretch(0, record(1, "a", A)))).toEqual([]);
    me.take(stretch(2, record(4, "a", C, "B")));
    expect(me.take(stretch(2, record(3, "a", A)))).toEqual([]);
    expect(me.entry()?.target?.revision).toBe(4);
  });

  test("one that was placed late gives way to the newer again", () => {
    const me = new Member().has(record(2, "a", B));
    const late = { kind: "placed", record: record(1, "a", A), etag: "late" } as const;
    expect(me.take(late)).toEqual([place(record(2, "a", B, A.sha256, ""), "late")]);
    expect(me.entry()?.base).toBe(1);
  });
});

describe("step() folders", () => {
  test("one that is to be gone and is not empty stays, as a change that beats the deletion", () => {
    const me = new Member().has(record(1, "d", FOLDER));
    const gone = record(2, "d", GONE);
    me.take(stretch(1, gone));
    expect(me.take({ kind: "kept", record: gone })).toEqual([propose("d", 2, FOLDER)]);
  });

  test("one that nobody knows of gives way to a file, unless it is full", () => {
    const me = new Member();
    me.take({ kind: "offline" });
    me.take(seen("d", FOLDER, "folder"));
    const made = record(1, "d", A);
    expect(me.take(stretch(0, made))).toEqual([place(made, "folder")]);
    expect(me.take({ kind: "kept", record: made })).toMatchObject([{ kind: "aside", path: "d" }]);
  });

  test("one that stays full goes aside for a file, under the name that it gets on all members", () => {
    const me = new Member().has(record(1, "d", FOLDER));
    const next = record(2, "d", A);
    me.take(stretch(1, next));
    const [effect] = me.take({ kind: "kept", record: next });
    expect(effect).toMatchObject({ kind: "aside", path: "d", to: conflictName("d", next.origin, next) });
    expect(isWanted(me.state, effect as Extract<Effect, { kind: "aside" }>)).toBe(true);
    expect(me.take(seen("d", GONE))).toEqual([place(next, "")]);
  });

  test("content that nobody has: what the tree has is proposed instead", () => {
    const me = new Member().has(record(1, "a", A));
    const next = record(2, "a", B, "A");
    me.take(stretch(1, next));
    expect(me.take({ kind: "kept", record: next })).toEqual([propose("a", 2, A)]);
  });
});

describe("step() stretches", () => {
  test("one that is doubled changes nothing, one after a gap asks for what is missing", () => {
    const me = new Member().has(record(1, "a", A));
    expect(me.take(stretch(0, record(1, "a", A)))).toEqual([]);
    expect(me.take(stretch(2, record(3, "a", B, "A")))).toEqual([{ kind: "read", after: 1 }]);
    expect([me.state.cursor, me.entry()?.target]).toEqual([1, undefined]);
  });

  test("an old one does not move the cursor back", () => {
    const me = new Member().has(record(1, "a", A)).has(record(2, "a", B));
    me.take(stretch(0, record(1, "a", A)));
    expect(me.state.cursor).toBe(2);
  });

  const part = (after: number, revision: number, ...records: Record[]): Event => {
    return { kind: "stretch", after, revision, records, snapshot: "part" };
  };
  const complete = (after: number, revision: number, ...records: Record[]): Event => {
    return { kind: "stretch", after, revision, records, snapshot: "complete" };
  };

  test("what a snapshot does not have was deleted; a change of it beats that", () => {
    const me = new Member()
      .has(record(1, "a", A))
      .has(record(2, "b", B))
      .has(record(3, "c", C));
    me.take({ kind: "offline" });
    me.take(seen("b", C));
    expect(me.take(part(0, 3, record(3, "c", C)))).toEqual([]);
    expect(me.state.cursor).toBe(3);
    const effects = me.take(complete(3, 9));
    expect(effects).toEqual([place({ ...GONE, path: "a", revision: 9, origin: "", over: "" }, "etag-A")]);
    expect([me.entry("b")?.base, me.entry("c")?.base, me.state.cursor]).toEqual([9, 3, 9]);
  });

  test("a snapshot with a part missing deletes nothing, and is asked for again", () => {
    const me = new Member()
      .has(record(1, "a", A))
      .has(record(2, "b", B))
      .has(record(3, "c", C));
    me.take(part(0, 1, record(1, "a", A)));
    expect(me.take(complete(2, 3, record(3, "c", C)))).toEqual([{ kind: "read", after: 3 }]);
    me.take(part(0, 1, record(1, "a", A)));
    me.take(part(1, 2, record(2, "b", B)));
    expect(me.take(complete(2, 3, record(3, "c", C)))).toEqual([]);
  });

  test("a snapshot that a new link cuts begins anew", () => {
    const me = new Member().has(record(1, "a", A)).has(record(2, "b", B));
    me.take(part(0, 1, record(1, "a", A)));
    me.take({ kind: "offline" });
    me.take({ kind: "online" });
    expect(me.take(complete(1, 9))).toEqual([{ kind: "read", after: 2 }]);
    expect(me.entry("b")?.target).toBeUndefined();
  });
});

describe("isWanted()", () => {
  test("a record is wanted until another is, or the tree has it", () => {
    const me = new Member().has(record(1, "a", A));
    const first = record(2, "a", B, "A");
    const wanted = (made: Record) => isWanted(me.state, { kind: "place", record: made, etag: "" });
    me.take(stretch(1, first));
    expect(wanted(first)).toBe(true);
    const second = record(3, "a", C, "B");
    me.take(stretch(2, second));
    expect([wanted(first), wanted(second)]).toEqual([false, true]);
    me.take(seen("a", C));
    expect(wanted(second)).toBe(false);
  });

  test("nothing has to go aside any more", () => {
    const me = new Member().has(record(1, "a", A));
    me.take({ kind: "offline" });
    me.take(seen("a", B));
    const [effect] = me.take(stretch(1, record(2, "a", C, "A"))) as Extract<Effect, { kind: "aside" }>[];
    expect(isWanted(me.state, effect!)).toBe(true);
    me.take(stretch(2, record(3, "a", B, "C")));
    expect(isWanted(me.state, effect!)).toBe(false);
  });
});

describe("conflictName()", () => {
  const at = file("A", Date.parse("2026-11-22T23:17:15.123Z") * 1000);
  const name = (path: string) => conflictName(path, "0123456789ab", at);

  test("beside the file, with who and when before the extension", () => {
    expect(name("a")).toBe("a.conflict-01234567-20261122T231715Z");
    expect(name("d/e/a.tar.gz")).toBe("d/e/a.tar.conflict-01234567-20261122T231715Z.gz");
    expect(name("d.d/a")).toBe("d.d/a.conflict-01234567-20261122T231715Z");
    expect(name(".profile")).toBe(".profile.conflict-01234567-20261122T231715Z");
    expect(name("naïve 文.txt")).toBe("naïve 文.conflict-01234567-20261122T231715Z.txt");
  });

  test("fits into a name, and cuts no character", () => {
    for (const stem of ["x", "ü", "文", "🦀"]) {
      for (const extension of ["", ".txt", `.${stem.repeat(100)}`]) {
        const made = name(`folder/${stem.repeat(250 / Buffer.byteLength(stem))}${extension}`).slice("folder/".length);
        expect(Buffer.byteLength(made)).toBeLessThanOrEqual(240);
        expect(made.isWellFormed()).toBe(true);
        expect(made).toStartWith(stem);
        expect(made).toContain(".conflict-01234567-20261122T231715Z");
      }
    }
  });
});
