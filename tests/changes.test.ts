/** The writing side of a root, in this process: what is put off, placed, refused, held and swept. */
import { describe, expect, setDefaultTimeout, test } from "bun:test";
import {
  chmodSync,
  closeSync,
  existsSync,
  linkSync,
  mkdirSync,
  openSync,
  readdirSync,
  readFileSync,
  readlinkSync,
  statSync,
  symlinkSync,
  truncateSync,
  utimesSync,
  writeFileSync,
} from "node:fs";
import { join } from "node:path";
import { type FolderChange, type FolderChanges, type FolderUpload, openChanges } from "../changes.ts";
import { openLocked } from "../disk.ts";
import { type ErrorCode, type Meta, type Put, RepriseError, SUM_BYTES, UNKNOWN_SIZE } from "../protocol.ts";
import { openFolder } from "../storage.ts";
import { HOME, makeRoot, randomBytes, TEST_MS, temporaryFolder, waitFor } from "./fixtures.ts";

setDefaultTimeout(TEST_MS);

const ID = "0123456789abcdef".repeat(2);
const DAY_MS = 24 * 3600 * 1000;

/** A root, open for changes, beneath a folder of which nothing else may be touched. */
interface Place extends Disposable {
  outside: string;
  root: string;
  changes: FolderChanges;
  staged(): string[];
}

function setUp(): Place {
  const folder = temporaryFolder();
  const root = join(folder.path, "root");
  mkdirSync(root);
  const changes = openChanges(root);
  return {
    outside: folder.path,
    root,
    changes,
    staged: () => readdirSync(join(root, ".reprise")).filter((name) => name !== "lock"),
    [Symbol.dispose]() {
      changes.close();
      folder[Symbol.dispose]();
    },
  };
}

const put = (path: string, fields: Partial<Put> = {}): Put => ({
  action: "put",
  path,
  id: "",
  offset: 0,
  size: UNKNOWN_SIZE,
  mtime: 1_000_000,
  noClobber: false,
  parents: false,
  etag: "",
  ...fields,
});

async function receive({ changes }: Place, request: Put, content: Uint8Array | string = ""): Promise<FolderUpload> {
  const bytes = typeof content === "string" ? new TextEncoder().encode(content) : content;
  const upload = changes.receive(request, true);
  if (bytes.length > 0) await upload.append(bytes, Bun.hash.crc32(bytes), () => {});
  await upload.settle();
  return upload;
}

async function apply({ changes }: Place, ...all: FolderChange[]) {
  const outcomes = await changes.apply(all);
  for (const change of all) if (change.action === "put") (change as FolderUpload).close();
  return outcomes;
}

async function putFile(it: Place, path: string, content: Uint8Array | string = "", fields: Partial<Put> = {}) {
  return (await apply(it, await receive(it, put(path, fields), content)))[0];
}

function codeOf(outcome: unknown): ErrorCode | undefined {
  return outcome instanceof RepriseError ? outcome.code : undefined;
}

const remove = (path: string, recursive = false) => ({ action: "remove", path, recursive }) as const;
const move = (path: string, to: string, overwrite = false) => ({ action: "move", path, to, overwrite }) as const;
const mkdir = (path: string, parents = false) => ({ action: "mkdir", path, parents }) as const;
const read = (it: Place, path: string) => readFileSync(join(it.root, path), "utf8");

describe("put", () => {
  test.each([1_700_000_000_123_456, 1, 0, -1, -1_000_001, -86_400_000_001, -2_000_000_000_999_999])(
    "keeps content and the time %d",
    async (mtime) => {
      using it = setUp();
      const meta = (await putFile(it, "f", "content", { mtime })) as Meta;
      expect(meta).toMatchObject({ kind: "file", size: 7, mtime });
      expect(read(it, "f")).toBe("content");
      expect(statSync(join(it.root, "f"), { bigint: true }).mtimeNs / 1000n).toBe(BigInt(mtime));
      expect(await openFolder(it.root).stat("f")).toEqual(meta);
      expect(it.staged()).toEqual([]);
    },
  );

  test("replaces the file that has the name, whole, and keeps its mode", async () => {
    using it = setUp();
    writeFileSync(join(it.root, "f"), "the old content");
    chmodSync(join(it.root, "f"), 0o640);
    const old = openSync(join(it.root, "f"), "r");
    await putFile(it, "f", "new");
    expect(read(it, "f")).toBe("new");
    expect(statSync(join(it.root, "f")).mode & 0o7777).toBe(0o640);
    expect(readFileSync(old, "utf8")).toBe("the old content");
    closeSync(old);
  });

  test("a new file has the mode that any new file has, and a setuid bit does not go over", async () => {
    using it = setUp();
    await putFile(it, "f", "x");
    expect(statSync(join(it.root, "f")).mode & 0o7777).toBe(0o666 & ~process.umask());
    chmodSync(join(it.root, "f"), 0o4755);
    await putFile(it, "f", "y");
    expect(statSync(join(it.root, "f")).mode & 0o7777).toBe(0o755);
  });

  test("a file with a second name is replaced under one of them", async () => {
    using it = setUp();
    writeFileSync(join(it.root, "a"), "old");
    linkSync(join(it.root, "a"), join(it.root, "b"));
    await putFile(it, "a", "new");
    expect([read(it, "a"), read(it, "b")]).toEqual(["new", "old"]);
  });

  test("nothing is under the name before it is applied, nor after it was let go", async () => {
    using it = setUp();
    const upload = await receive(it, put("f"), "x");
    expect(readdirSync(it.root)).toEqual([".reprise"]);
    upload.close();
    expect(readdirSync(it.root)).toEqual([".reprise"]);
    expect(it.staged()).toEqual([]);
  });

  test("one that failed leaves nothing staged without an id, and all of it with one", async () => {
    using it = setUp();
    mkdirSync(join(it.root, "d"));
    expect(codeOf(await putFile(it, "d", "x"))).toBe("not_a_file");
    expect(it.staged()).toEqual([]);
    expect(codeOf(await putFile(it, "d", "x", { id: ID }))).toBe("not_a_file");
    expect(it.staged()).toEqual([`put-${ID}`]);
  });

  const places: [string, string, ErrorCode][] = [
    ["a folder", "d", "not_a_file"],
    ["the root", "", "refused"],
    ["under a file", "f/x", "not_a_folder"],
    ["under what is not there", "no/x", "not_found"],
    ["under a link to a folder outside", "out/x", "not_a_folder"],
    ["further under a link to a folder outside", "out/folder/x", "refused"],
    ["a link to a file outside", "link", "refused"],
    ["a link to nothing", "dangling", "refused"],
    ["a pipe", "fifo", "refused"],
    ["out of the root", "../x", "bad_name"],
    ["an absolute path", "/etc/x", "bad_name"],
    ["over an inner ..", "d/../x", "bad_name"],
    ["a name with a NUL", "a\0b", "bad_name"],
    ["a name with a newline", "a\nb", "bad_name"],
    ["the server's folder", ".reprise", "refused"],
    ["in the server's folder", ".reprise/x", "refused"],
    ["a client's folder of its own", ".reprise-1/x", "refused"],
    ["an unfinished file", "x.part", "refused"],
    ["in a folder named as an unfinished file", "x.part/y", "refused"],
    ["a name of 256 bytes", "a".repeat(256), "bad_name"],
    ["a name of 128 letters with 256 bytes", "é".repeat(128), "bad_name"],
  ];
  test.each(places)("%s is refused, at once where it is large, and nothing is touched", async (_, path, code) => {
    using it = setUp();
    mkdirSync(join(it.root, "d"));
    mkdirSync(join(it.outside, "folder"));
    writeFileSync(join(it.root, "f"), "f");
    writeFileSync(join(it.outside, "file"), "outside");
    symlinkSync(join(it.outside, "folder"), join(it.root, "out"));
    symlinkSync(join(it.outside, "file"), join(it.root, "link"));
    symlinkSync("nothing", join(it.root, "dangling"));
    Bun.spawnSync(["mkfifo", join(it.root, "fifo")]);
    const before = readdirSync(it.outside, { recursive: true }).sort();
    const outcome = await putFile(it, path, "x");
    expect(codeOf(outcome)).toBe(code);
    expect((outcome as RepriseError).message).not.toContain(it.outside);
    expect(() => it.changes.receive(put(path), false)).toThrow((outcome as RepriseError).message);
    expect(readdirSync(it.outside, { recursive: true }).sort()).toEqual(before);
    expect(readFileSync(join(it.outside, "file"), "utf8")).toBe("outside");
    expect(readlinkSync(join(it.root, "link"))).toBe(join(it.outside, "file"));
    expect(read(it, "f")).toBe("f");
  });

  test("a name of 255 bytes", async () => {
    using it = setUp();
    for (const name of ["a".repeat(255), `${"é".repeat(127)}x`]) {
      expect(await putFile(it, name, "x")).toMatchObject({ size: 1 });
      expect(read(it, name)).toBe("x");
    }
  });

  test.each(["x", "A".repeat(32), "0".repeat(31), "0".repeat(33), "../lock".padEnd(32, "0"), `${"0".repeat(31)}\n`])(
    "the id %j is refused",
    (id) => {
      using it = setUp();
      expect(() => it.changes.receive(put("f", { id }), true)).toThrow("not an upload id");
      expect(it.staged()).toEqual([]);
    },
  );

  test("only if nothing has the name: not in place of a file, also when it came in between", async () => {
    using it = setUp();
    const upload = await receive(it, put("f", { noClobber: true }), "mine");
    writeFileSync(join(it.root, "f"), "theirs");
    expect(codeOf((await apply(it, upload))[0])).toBe("exists");
    expect(read(it, "f")).toBe("theirs");
    expect(() => it.changes.receive(put("f", { noClobber: true }), false)).toThrow("exists already");
    expect(await putFile(it, "g", "g", { noClobber: true })).toMatchObject({ size: 1 });
  });

  test("only in place of one version: that one, not another, not none", async () => {
    using it = setUp();
    const first = (await putFile(it, "f", "one")) as Meta;
    const second = (await putFile(it, "f", "two", { etag: first.etag })) as Meta;
    expect(second.etag).not.toBe(first.etag);
    expect(read(it, "f")).toBe("two");
    expect(codeOf(await putFile(it, "f", "three", { etag: first.etag }))).toBe("changed");
    expect(codeOf(await putFile(it, "none", "x", { etag: first.etag }))).toBe("changed");
    expect(() => it.changes.receive(put("f", { etag: first.etag }), false)).toThrow("not the version");
    expect(read(it, "f")).toBe("two");
    expect(existsSync(join(it.root, "none"))).toBe(false);
  });

  test("one upload is taken over one connection at a time", async () => {
    using it = setUp();
    const first = await receive(it, put("f", { id: ID }), "x");
    expect(() => it.changes.receive(put("f", { id: ID }), true)).toThrow("still being received");
    expect(await apply(it, first)).toMatchObject([{ size: 1 }]);
    expect(await putFile(it, "g", "yy", { id: ID })).toMatchObject({ size: 2 });
    expect([read(it, "f"), read(it, "g")]).toEqual(["x", "yy"]);
  });

  test("what stands at a staged name and is no file is neither written nor followed", () => {
    using it = setUp();
    writeFileSync(join(it.outside, "file"), "outside");
    symlinkSync(join(it.outside, "file"), join(it.root, ".reprise", `put-${ID}`));
    expect(() => it.changes.receive(put("f", { id: ID }), true)).toThrow(RepriseError);
    expect(readFileSync(join(it.outside, "file"), "utf8")).toBe("outside");
  });
});

describe("an upload that goes on", () => {
  test("at what is held: what lies beyond is dropped", async () => {
    using it = setUp();
    (await receive(it, put("f", { id: ID }), "0123456789")).close();
    expect(await putFile(it, "f", "abc", { id: ID, offset: 4 })).toMatchObject({ size: 7 });
    expect(read(it, "f")).toBe("0123abc");
    expect(it.staged()).toEqual([]);
  });

  test.each([0, 9, 10])("at byte %d of 10", async (offset) => {
    using it = setUp();
    (await receive(it, put("f", { id: ID }), "0123456789")).close();
    await putFile(it, "f", "x", { id: ID, offset });
    expect(read(it, "f")).toBe(`${"0123456789".slice(0, offset)}x`);
  });

  test("beyond what is held it is refused, also when nothing is", async () => {
    using it = setUp();
    expect(() => it.changes.receive(put("f", { id: ID, offset: 1 }), true)).toThrow("does not hold 1 bytes");
    expect(() => it.changes.receive(put("f", { offset: 1 }), true)).toThrow("does not hold 1 bytes");
    expect(it.staged()).toEqual([]);
    (await receive(it, put("f", { id: ID }), "0123456789")).close();
    expect(() => it.changes.receive(put("f", { id: ID, offset: 11 }), true)).toThrow("does not hold 11 bytes");
  });

  test("the sums of what is held, piece by piece", async () => {
    using it = setUp();
    const sums = (id: string) => Array.fromAsync(it.changes.sums(id));
    expect(await sums(ID)).toEqual([]);
    expect(await sums("../../../etc/passwd")).toEqual([]);
    const content = randomBytes(SUM_BYTES + 1000, 5);
    const upload = await receive(it, put("f", { id: ID }), content);
    expect(await sums(ID)).toEqual([
      { length: SUM_BYTES, crc32: Bun.hash.crc32(content.subarray(0, SUM_BYTES)) },
      { length: 1000, crc32: Bun.hash.crc32(content.subarray(SUM_BYTES)) },
    ]);
    await apply(it, upload);
    expect(await sums(ID)).toEqual([]);
  });
});

describe("a group", () => {
  test("is made in its order, each change with its own outcome", async () => {
    using it = setUp();
    const outcomes = await apply(
      it,
      mkdir("d"),
      await receive(it, put("d/a"), "one"),
      await receive(it, put("d/a"), "two"),
      move("d/a", "d/b"),
      remove("d/a"),
      await receive(it, put("d/b", { noClobber: true }), "three"),
      await receive(it, put("e/b"), "four"),
      mkdir("d"),
      move("d", "e"),
      await receive(it, put("e/c"), "five"),
      remove("e/b"),
    );
    expect(outcomes.map((outcome) => codeOf(outcome) ?? (outcome as Meta | undefined)?.size)).toEqual([
      undefined,
      3,
      3,
      undefined,
      "not_found",
      "exists",
      "not_found",
      "exists",
      undefined,
      4,
      undefined,
    ]);
    expect(readdirSync(it.root).sort()).toEqual([".reprise", "e"]);
    expect(readdirSync(join(it.root, "e"))).toEqual(["c"]);
    expect(it.staged()).toEqual([]);
  });

  test("a folder that was removed or moved is not what its name stands for any more", async () => {
    using it = setUp();
    const outcomes = await apply(
      it,
      mkdir("d"),
      await receive(it, put("d/x"), "one"),
      remove("d", true),
      await receive(it, put("d/y"), "lost"),
      mkdir("d"),
      await receive(it, put("d/z"), "two"),
    );
    expect(outcomes.map(codeOf)).toEqual([undefined, undefined, undefined, "not_found", undefined, undefined]);
    expect(readdirSync(join(it.root, "d"))).toEqual(["z"]);
  });

  test("two that share a root never mix up their names", async () => {
    using it = setUp();
    const other = { ...it, changes: openChanges(it.root) };
    const results = await Promise.all(
      Array.from({ length: 50 }, (_, index) =>
        putFile(index % 2 === 0 ? it : other, "f", `${index}`.repeat(100), { noClobber: true }),
      ),
    );
    expect(results.filter((outcome) => codeOf(outcome) === undefined).length).toBe(1);
    const first = results.findIndex((outcome) => codeOf(outcome) === undefined);
    expect(read(it, "f")).toBe(`${first}`.repeat(100));
    expect(it.staged()).toEqual([]);
    other.changes.close();
  });
});

describe("remove, move, mkdir", () => {
  test("a file, a folder with all that is in it, but not a folder as if it were a file", async () => {
    using it = setUp();
    mkdirSync(join(it.root, "d/e"), { recursive: true });
    writeFileSync(join(it.root, "d/e/f"), "x");
    writeFileSync(join(it.root, "f"), "x");
    expect(codeOf((await apply(it, remove("d")))[0])).toBe("refused");
    expect(await apply(it, remove("f"), remove("d", true))).toEqual([undefined, undefined]);
    expect(readdirSync(it.root)).toEqual([".reprise"]);
    await waitFor("the trash is empty", () => it.staged().length === 0);
    expect((await apply(it, remove("f"), remove("d", true), remove("", true))).map(codeOf)).toEqual([
      "not_found",
      "not_found",
      "refused",
    ]);
  });

  test("a folder is removed up to the links in it, and not what they lead to", async () => {
    using it = setUp();
    mkdirSync(join(it.outside, "folder"));
    writeFileSync(join(it.outside, "folder/file"), "outside");
    mkdirSync(join(it.root, "d"));
    symlinkSync(join(it.outside, "folder"), join(it.root, "d/link"));
    expect(codeOf((await apply(it, remove("d/link/file")))[0])).toBe("not_a_folder");
    expect(codeOf((await apply(it, remove("d", true)))[0])).toBeUndefined();
    await waitFor("the trash is empty", () => it.staged().length === 0);
    expect(readFileSync(join(it.outside, "folder/file"), "utf8")).toBe("outside");
  });

  test("a link is not removed, moved or replaced by its name", async () => {
    using it = setUp();
    writeFileSync(join(it.outside, "file"), "outside");
    symlinkSync("../file", join(it.root, "link"));
    writeFileSync(join(it.root, "f"), "f");
    const outcomes = await apply(it, remove("link"), move("link", "x"), move("f", "link"), move("f", "link", true));
    expect(outcomes.map(codeOf)).toEqual(["refused", "refused", "exists", "refused"]);
    expect(readlinkSync(join(it.root, "link"))).toBe("../file");
    expect(readFileSync(join(it.outside, "file"), "utf8")).toBe("outside");
    expect(read(it, "f")).toBe("f");
  });

  const moves: [string, string, string, boolean, ErrorCode | undefined][] = [
    ["a file to a new name", "f", "h", false, undefined],
    ["a file into a folder", "f", "d/f", false, undefined],
    ["a folder to a new name", "d", "h", false, undefined],
    ["onto a file", "f", "g", false, "exists"],
    ["onto a file, by force", "f", "g", true, undefined],
    ["a file onto a folder, by force", "f", "d", true, "not_a_file"],
    ["a file onto a folder", "f", "d", false, "not_a_file"],
    ["a folder onto a file", "d", "f", false, "exists"],
    ["a folder onto a file, by force", "d", "f", true, "not_a_folder"],
    ["a folder onto one that is not empty, by force", "d", "full", true, "exists"],
    ["a folder onto an empty one, by force", "d", "empty", true, undefined],
    ["a folder onto an empty one", "d", "empty", false, "exists"],
    ["a folder into itself", "d", "d/d", false, "refused"],
    ["a file onto itself", "f", "f", false, "exists"],
    ["what is not there", "none", "h", false, "not_found"],
    ["into what is not there", "f", "none/f", false, "not_found"],
    ["into a file", "f", "g/f", false, "not_a_folder"],
    ["the root", "", "h", false, "refused"],
    ["into the server's folder", "f", ".reprise/f", false, "refused"],
    ["out of the server's folder", ".reprise/lock", "lock", false, "refused"],
    ["to the name of an unfinished file", "f", "f.part", false, "refused"],
    ["out of the root", "f", "../f", false, "bad_name"],
  ];
  test.each(moves)("move %s", async (_, from, to, overwrite, code) => {
    using it = setUp();
    for (const name of ["d", "full", "empty"]) mkdirSync(join(it.root, name));
    for (const name of ["f", "g", "d/x", "full/y"]) writeFileSync(join(it.root, name), `content of ${name}`);
    const before = readdirSync(it.root, { recursive: true }).sort();
    const [outcome] = await apply(it, move(from, to, overwrite));
    expect(codeOf(outcome)).toBe(code);
    if (code) {
      expect(readdirSync(it.root, { recursive: true }).sort()).toEqual(before);
      for (const name of ["f", "g", "d/x", "full/y"]) expect(read(it, name)).toBe(`content of ${name}`);
      return;
    }
    expect(existsSync(join(it.root, from))).toBe(false);
    expect(read(it, from === "d" ? `${to}/x` : to)).toBe(`content of ${from === "d" ? "d/x" : from}`);
  });

  test("a folder, one that is there, one below others", async () => {
    using it = setUp();
    writeFileSync(join(it.root, "f"), "f");
    const made = [mkdir("a"), mkdir("a"), mkdir("a", true), mkdir("b/c"), mkdir("b/c/d", true), mkdir("b/c")];
    expect((await apply(it, ...made)).map(codeOf)).toEqual([
      undefined,
      "exists",
      undefined,
      "not_found",
      undefined,
      "exists",
    ]);
    const refused = [
      mkdir("f"),
      mkdir("f", true),
      mkdir("f/g", true),
      mkdir(""),
      mkdir(".reprise/x", true),
      mkdir(".."),
    ];
    expect((await apply(it, ...refused)).map(codeOf)).toEqual([
      "exists",
      "not_a_folder",
      "not_a_folder",
      "exists",
      "refused",
      "bad_name",
    ]);
    expect((await apply(it, mkdir("", true)))[0]).toBeUndefined();
    expect(statSync(join(it.root, "b/c/d")).isDirectory()).toBe(true);
  });

  test("mkdir -p does not follow a link", async () => {
    using it = setUp();
    mkdirSync(join(it.outside, "folder"));
    symlinkSync(join(it.outside, "folder"), join(it.root, "link"));
    expect((await apply(it, mkdir("link", true), mkdir("link/x", true))).map(codeOf)).toEqual([
      "not_a_folder",
      expect.stringMatching(/not_a_folder|refused/),
    ]);
    expect(readdirSync(join(it.outside, "folder"))).toEqual([]);
  });
});

describe("sweep()", () => {
  const id = (digit: string) => digit.repeat(32);

  test("takes an upload that is a week old, and leaves a younger one and one that is being received", async () => {
    using it = setUp();
    for (const digit of ["1", "2"]) (await receive(it, put("f", { id: id(digit) }), "x")).close();
    const alive = await receive(it, put("f", { id: id("3") }), "x");
    await it.changes.sweep();
    await it.changes.sweep(Date.now() + 6.9 * DAY_MS);
    expect(it.staged().length).toBe(3);
    // A time that was set does not make it older than it is.
    utimesSync(join(it.root, ".reprise", `put-${id("1")}`), 0, 0);
    await it.changes.sweep();
    expect(it.staged().length).toBe(3);
    await it.changes.sweep(Date.now() + 7.1 * DAY_MS);
    expect(it.staged()).toEqual([`put-${id("3")}`]);
    expect(await apply(it, alive)).toMatchObject([{ size: 1 }]);
    expect(it.staged()).toEqual([]);
  });

  test("leaves one that another process has locked", async () => {
    using it = setUp();
    const staged = join(it.root, ".reprise", `put-${id("1")}`);
    const fd = openLocked(staged);
    await it.changes.sweep(Date.now() + 8 * DAY_MS);
    expect(existsSync(staged)).toBe(true);
    closeSync(fd);
    await it.changes.sweep(Date.now() + 8 * DAY_MS);
    expect(existsSync(staged)).toBe(false);
  });

  test("takes what dead processes left and what was removed, and nothing of the living", async () => {
    using it = setUp();
    const staging = join(it.root, ".reprise");
    const dead = Bun.spawnSync(["true"]).pid;
    writeFileSync(join(staging, `new-${dead}-abc-1`), "x");
    writeFileSync(join(staging, `new-${process.ppid}-abc-1`), "x");
    mkdirSync(join(staging, "trash-1/below"), { recursive: true });
    writeFileSync(join(staging, "trash-1/below/f"), "x");
    const alive = await receive(it, put("f"), "x");
    await it.changes.sweep();
    expect(it.staged().filter((name) => name !== `new-${process.ppid}-abc-1`)).toEqual([
      expect.stringMatching(new RegExp(`^new-${process.pid}-.*-1$`)),
    ]);
    expect(existsSync(join(staging, `new-${process.ppid}-abc-1`))).toBe(true);
    expect(await apply(it, alive)).toMatchObject([{ size: 1 }]);
  });

  test("is not stopped by the lock of a dead process that had no FFI", async () => {
    using it = setUp();
    (await receive(it, put("f", { id: ID }), "x")).close();
    symlinkSync(String(Bun.spawnSync(["true"]).pid), join(it.root, ".reprise", `put-${id("2")}.lock`));
    await it.changes.sweep(Date.now() + 8 * DAY_MS);
    expect(it.staged()).toEqual([`put-${id("2")}.lock`]);
  });

  test("an upload that is swept while it waits is started again, not mixed", async () => {
    using it = setUp();
    (await receive(it, put("f", { id: ID }), "0123456789")).close();
    await it.changes.sweep(Date.now() + 8 * DAY_MS);
    expect(() => it.changes.receive(put("f", { id: ID, offset: 5 }), true)).toThrow("does not hold 5 bytes");
    expect(await putFile(it, "f", "new", { id: ID })).toMatchObject({ size: 3 });
  });
});

test("a staged file that became shorter behind our back is never gone on with beyond its end", async () => {
  using it = setUp();
  (await receive(it, put("f", { id: ID }), "0123456789")).close();
  truncateSync(join(it.root, ".reprise", `put-${ID}`), 3);
  expect(() => it.changes.receive(put("f", { id: ID, offset: 10 }), true)).toThrow("does not hold 10 bytes");
});

test("openChanges() takes a root whose staging folder is a link for one that cannot be written", () => {
  using folder = temporaryFolder();
  mkdirSync(join(folder.path, "root"));
  mkdirSync(join(folder.path, "elsewhere"));
  symlinkSync("../elsewhere", join(folder.path, "root/.reprise"));
  expect(() => openChanges(join(folder.path, "root"))).toThrow();
  expect(readdirSync(join(folder.path, "elsewhere"))).toEqual([]);
});

/** Takes and leaves a lock 200 times; counts how often somebody else was in at the same time. */
const CONTENDER = `
  import { closeSync, mkdirSync, rmdirSync } from "node:fs";
  const { openLocked, Held, removeIfThere, unlock } = await import(process.env.DISK);
  const path = process.env.LOCK;
  for (let taken = 0, clashes = 0; taken < 200; ) {
    try {
      const fd = openLocked(path);
      taken++;
      try { mkdirSync(path + ".in"); } catch { clashes++; }
      rmdirSync(path + ".in");
      if (taken % 2 === 0) removeIfThere(path);
      unlock(fd, path);
      closeSync(fd);
      if (taken === 200) process.exit(clashes);
    } catch (error) {
      if (!(error instanceof Held)) throw error;
    }
  }
`;

test.each(["0", "1"])("openLocked() lets one in at a time (REPRISE_FFI=%s)", async (ffi) => {
  using folder = temporaryFolder();
  const env = { ...process.env, REPRISE_FFI: ffi, LOCK: join(folder.path, "f"), DISK: join(HOME, "disk.ts") };
  const spawn = () => Bun.spawn([process.execPath, "-e", CONTENDER], { env, stderr: "pipe" });
  const contenders = [spawn(), spawn(), spawn()];
  expect(await Promise.all(contenders.map((child) => new Response(child.stderr).text()))).toEqual(["", "", ""]);
  expect(await Promise.all(contenders.map((child) => child.exited))).toEqual([0, 0, 0]);
});

describe("folders of a group", () => {
  /** As many folders are kept open at a time as all groups of a process may have. */
  const KEPT = 256;

  test.each([-2, -1, 0, 1, 2])("a move behind %i folders more than are kept open moves what it names", async (more) => {
    using root = makeRoot({ "a/x": "from a", "b/x": "from b" });
    const changes = openChanges(root.path);
    const others = Array.from({ length: KEPT + more }, (_, index) => `d${index}`);
    for (const name of others) mkdirSync(join(root.path, name));
    const mkdir = (path: string) => ({ action: "mkdir", path, parents: false }) as const;
    const group = [mkdir("a/new"), ...others.map((name) => mkdir(`${name}/new`))];
    const outcomes = await changes.apply([...group, { action: "move", path: "a/x", to: "b/y", overwrite: false }]);
    expect(outcomes.filter((outcome) => outcome !== undefined)).toEqual([]);
    const files = ["a/new", "b/x", "b/y"].map((name) => existsSync(join(root.path, name)));
    expect([...files, existsSync(join(root.path, "a/x"))]).toEqual([true, true, true, false]);
    expect(readFileSync(join(root.path, "b/y"), "utf8")).toBe("from a");
    changes.close();
  });

  test("mkdir -p holds few folders and goes no deeper than 128; all are closed afterwards", async () => {
    using root = makeRoot({});
    const changes = openChanges(root.path);
    const open = () => readdirSync("/proc/self/fd").length;
    const before = open();
    const path = (depth: number) => Array.from({ length: depth }, () => "d").join("/");
    const mkdir = (depth: number) => ({ action: "mkdir", path: path(depth), parents: true }) as const;
    expect(await changes.apply([mkdir(128), mkdir(128)])).toEqual([undefined, undefined]);
    expect(existsSync(join(root.path, path(128)))).toBe(true);
    const [outcome] = await changes.apply([mkdir(129)]);
    expect(outcome).toBeInstanceOf(RepriseError);
    expect((outcome as RepriseError).message).toContain("more than 128 folders deep");
    expect(open()).toBe(before);
    changes.close();
  });
});
