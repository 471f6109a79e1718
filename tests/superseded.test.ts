/** replica.ts where a member's tree has something of the log that the log has already gone beyond. */
import { expect, test } from "bun:test";
import { FOLDER, GONE, type Record, type Version } from "../ledger.ts";
import { type Effect, type Entry, type Event, type State, step } from "../replica.ts";

const PATH = "a.txt";

/** A member that has taken in these events, and what was last to be done. */
function after(...events: Event[]): Effect[] {
  const entries = new Map<string, Entry>();
  const state: State = {
    node: "here",
    entries: {
      get: (path) => structuredClone(entries.get(path)),
      set: (entry) => void entries.set(entry.path, structuredClone(entry)),
      remove: (path) => void entries.delete(path),
      open: () => [...entries.values()].filter(({ target, sent }) => target || sent),
      based: () => entries.keys(),
    },
    cursor: 0,
    online: true,
    snapshot: undefined,
  };
  return events.map((event) => step(state, event)).at(-1)!;
}

const file = (content: string): Version => ({ kind: "file", size: 1, mtime: 1_000_000, sha256: content.repeat(64) });

/** What another member has done, one after the other. */
function log(...versions: Version[]): Event[] {
  return versions.map((version, at) => {
    const record: Record = {
      path: PATH,
      revision: at + 1,
      ...version,
      origin: "there",
      over: versions[at - 1]?.sha256 ?? "",
    };
    return { kind: "stretch", after: at, revision: at + 1, records: [record] };
  });
}

const seen = (version: Version): Event => ({ kind: "seen", path: PATH, version, etag: "etag" });
const placing = (revision: number) => [
  expect.objectContaining({ kind: "place", record: expect.objectContaining({ revision }) }),
];

test("step() what was placed and seen before that was known is no change (the log is one further)", () => {
  expect(after(...log(file("1"), file("2")), seen(file("1")))).toEqual(placing(2));
});

test("step() the same, and the log is three further", () => {
  expect(after(...log(file("1"), file("2"), file("3"), file("4")), seen(file("1")))).toEqual(placing(4));
});

test("step() the same, and the log has it deleted by now: it does not come back", () => {
  const [first, ...rest] = log(file("1"), file("2"), file("3"), GONE) as [Event, ...Event[]];
  expect(after(first, seen(file("1")), ...rest, seen(file("2")))).toEqual(placing(4));
});

test("step() what was placed late goes again, where something newer had needed nothing to be done", () => {
  const late = (version: Version, ...others: Version[]) => {
    const [first, ...rest] = log(version, ...others) as [Event & { kind: "stretch" }, ...Event[]];
    return after(first, ...rest, { kind: "placed", record: first.records[0]!, etag: "etag" });
  };
  expect(late(file("1"), GONE)).toEqual(placing(2));
  expect(late(FOLDER, GONE)).toEqual(placing(2));
  expect(late(file("1"), file("2"))).toEqual(placing(2));
});

test("step() what the log never had is a change as ever", () => {
  expect(after(...log(file("1"), file("2")), seen(file("3")))).toEqual([expect.objectContaining({ kind: "aside" })]);
  expect(after(...log(file("1"), GONE), seen(file("3")))).toEqual([expect.objectContaining({ kind: "propose" })]);
});
