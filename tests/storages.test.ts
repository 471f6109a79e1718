/** What every root promises, whatever it is on: the same requests to a real server get the same answers. */
import { afterAll, beforeAll, describe, expect, setDefaultTimeout, test } from "bun:test";
import { join } from "node:path";
import { MAX_WHOLE_BYTES, SUM_BYTES, UNKNOWN_SIZE } from "../protocol.ts";
import { type Ceph, noCeph, startCeph } from "./engines.ts";
import { HOME, makeRoot, randomBytes, startServer, TEST_MS, waitFor } from "./fixtures.ts";
import { codeOf, type PutOptions, Talk } from "./talk.ts";

setDefaultTimeout(TEST_MS);

let ceph: Ceph | undefined;
let count = 0;
if (noCeph) console.log(`skipped on S3: ${noCeph}`);
beforeAll(async () => {
  if (noCeph) return;
  ceph = await startCeph();
  await ceph.createBucket("storages");
});
afterAll(async () => ceph?.[Symbol.asyncDispose]());

/** A new, empty root: what the server is started with. */
interface Storage {
  root: string;
  env: Record<string, string>;
}

const storages: [string, () => Storage & Disposable][] = [
  [
    "a folder",
    () => {
      const root = makeRoot({});
      return { root: root.path, env: {}, [Symbol.dispose]: () => root[Symbol.dispose]() };
    },
  ],
];
if (!noCeph) {
  storages.push(["S3", () => ({ root: `s3://storages/no ${++count}/é`, env: ceph!.env, [Symbol.dispose]() {} })]);
}

const MIB = 1024 * 1024;
const ID = "0123456789abcdef0123456789abcdef";
const crc32 = (bytes: Uint8Array) => Bun.hash.crc32(bytes);

describe.each(storages)("on %s", (_, make) => {
  async function start(args: string[] = []) {
    const storage = make();
    const server = await startServer(storage.root, { args: ["--writable", ...args], env: storage.env });
    const talk = await Talk.to(server.port);
    return Object.assign(talk, {
      server,
      storage,
      async [Symbol.asyncDispose]() {
        talk[Symbol.dispose]();
        await server[Symbol.asyncDispose]();
        storage[Symbol.dispose]();
      },
    });
  }

  describe("put and get", () => {
    const sizes = [0, 1, MAX_WHOLE_BYTES, MAX_WHOLE_BYTES + 1, 8 * MIB - 1, 8 * MIB, 8 * MIB + 1, 20_000_003];
    test.each(sizes)("%d bytes", async (size) => {
      await using it = await start();
      const content = randomBytes(size);
      const mtime = 1_700_000_000_123_456;
      const put = await it.put("f", content, { mtime });
      expect(put).toMatchObject({ kind: "file", size, mtime });
      expect(await it.stat("f")).toEqual(put);
      const got = await it.get("f");
      expect(got.meta).toEqual(put);
      expect(got.content.equals(content)).toBe(true);
      expect(await it.names()).toEqual(["f"]);
    });

    test("in one frame, and of a size that is not known", async () => {
      await using it = await start();
      await it.put("whole", "content", { whole: true });
      await it.put("unknown", randomBytes(9 * MIB), { size: UNKNOWN_SIZE });
      expect((await it.get("whole")).content.toString()).toBe("content");
      expect((await it.get("unknown")).content.equals(randomBytes(9 * MIB))).toBe(true);
    });

    test.each([0, 1, -1, -1_000_001, -86_399_999_999, 1_700_000_000_000_000])("the time %d", async (mtime) => {
      await using it = await start();
      await it.put("f", "x", { mtime });
      expect((await it.stat("f")).mtime).toBe(mtime);
      expect(await it.list()).toEqual([{ kind: "file", size: 1, mtime, path: "f" }]);
    });

    test("any range", async () => {
      await using it = await start();
      const content = randomBytes(3_000_000);
      const { etag } = await it.put("f", content);
      for (const [offset, length] of [
        [0, 1],
        [1, 2_999_999],
        [65_535, 2],
        [262_143, 1_000_000],
        [2_999_999, 1],
        [3_000_000, 5],
        [10, 0],
      ] as const) {
        const got = await it.get("f", { offset, length, etag });
        expect(got.content.equals(content.subarray(offset, offset + length))).toBe(true);
      }
      expect(await codeOf(it.get("f", { offset: 3_000_001 }))).toBe("bad_range");
      expect(await codeOf(it.get("f", { etag: "other" }))).toBe("changed");
    });

    test("a file in place of another is another version, though it has the same size and time", async () => {
      await using it = await start();
      const before = await it.put("f", "one", { mtime: 5 });
      const after = await it.put("f", "two", { mtime: 5 });
      expect(after.etag).not.toBe(before.etag);
      expect((await it.get("f")).content.toString()).toBe("two");
      expect(await codeOf(it.get("f", { etag: before.etag }))).toBe("changed");
    });

    test("checksums of a file", async () => {
      await using it = await start();
      const content = randomBytes(SUM_BYTES + 5_000);
      await it.put("f", content);
      expect(await it.peer.sums("", "f")).toMatchObject([
        { length: SUM_BYTES, crc32: crc32(content.subarray(0, SUM_BYTES)) },
        { length: 5_000, crc32: crc32(content.subarray(SUM_BYTES)) },
      ]);
    });

    test("names of all kinds", async () => {
      await using it = await start();
      const names = [
        "a b",
        "é🎈",
        "%2e%2e",
        "..\\x",
        "+&=?#;,~!*'()",
        '"<&>',
        "a\tb",
        "…",
        "x".repeat(255),
        " lead ",
        "-",
      ];
      for (const name of names) await it.put(name, name);
      expect(await it.names()).toEqual(names.toSorted());
      expect(await it.names("", false)).toEqual(names.toSorted());
      for (const name of names) expect((await it.get(name)).content.toString()).toBe(name);
      for (const name of names) await it.move(name, `${name.slice(0, 200)}2`);
      for (const name of names) await it.remove(`${name.slice(0, 200)}2`);
      expect(await it.names()).toEqual([]);
    });
  });

  describe("an upload", () => {
    const content = randomBytes(30 * MIB + 11);
    const options: PutOptions = { id: ID, size: content.length, mtime: 7 };

    test("that was cut is gone on with, and seen when it is complete", async () => {
      await using it = await start();
      using first = await Talk.to(it.server.port);
      await first.begin("f", content.subarray(0, 25 * MIB), options);
      await waitFor("something is held", async () => (await it.peer.sums(ID, "")).length > 0);
      expect(await it.names()).toEqual([]);
      expect(await codeOf(it.stat("f"))).toBe("not_found");
      first.peer.close();
      let held = 0;
      for (const { length, crc32: sum } of await it.peer.sums(ID, "")) {
        expect(sum).toBe(crc32(content.subarray(held, held + length)));
        held += length;
      }
      expect(held).toBeGreaterThan(0);
      const put = async () => it.put("f", content.subarray(held), { ...options, offset: held });
      await waitFor("the other connection is over", async () => (await codeOf(put())) !== "in_use");
      expect((await it.get("f")).content.equals(content)).toBe(true);
      expect((await it.stat("f")).mtime).toBe(7);
      expect(await it.peer.sums(ID, "")).toEqual([]);
      expect(await it.names()).toEqual(["f"]);
    });

    test("begins anew where it is sent from its start", async () => {
      await using it = await start();
      using first = await Talk.to(it.server.port);
      await first.begin("f", content.subarray(0, 20 * MIB), options);
      await waitFor("something is held", async () => (await it.peer.sums(ID, "")).length > 0);
      first.peer.close();
      const other = randomBytes(9 * MIB, 2);
      const put = async () => it.put("f", other, { id: ID, mtime: 7 });
      await waitFor("the other connection is over", async () => (await codeOf(put())) !== "in_use");
      expect((await it.get("f")).content.equals(other)).toBe(true);
    });

    test("of which nothing is held cannot be gone on with", async () => {
      await using it = await start();
      expect(await it.peer.sums(ID, "")).toEqual([]);
      const part = content.subarray(0, MIB);
      expect(await codeOf(it.put("f", part, { ...options, offset: content.length - MIB }))).toBe("bad_range");
    });

    test("that does not have its size is refused, and leaves nothing", async () => {
      await using it = await start();
      expect(await codeOf(it.put("f", content.subarray(0, 20 * MIB), options))).toBe("refused");
      expect(await codeOf(it.put("f", content, { ...options, size: 20 * MIB }))).toBe("refused");
      expect(await it.peer.sums(ID, "")).toEqual([]);
      expect(await it.names()).toEqual([]);
    });

    test("is not larger than --max-upload", async () => {
      await using it = await start(["--max-upload", "10M"]);
      await it.put("f", content.subarray(0, 10 * MIB));
      expect(await codeOf(it.put("g", content.subarray(0, 10 * MIB + 1)))).toBe("too_large");
      expect(await codeOf(it.put("g", content.subarray(0, 12 * MIB), { size: UNKNOWN_SIZE }))).toBe("too_large");
      expect(await it.names()).toEqual(["f"]);
    });

    test("under a condition", async () => {
      await using it = await start();
      for (const bytes of [100, 9 * MIB]) {
        const [one, two, three] = [1, 2, 3].map((seed) => randomBytes(bytes, seed)) as [
          Uint8Array,
          Uint8Array,
          Uint8Array,
        ];
        const name = `of ${bytes}`;
        expect(await codeOf(it.put(name, one, { etag: "none" }))).toBe("changed");
        const { etag } = await it.put(name, one, { noClobber: true });
        expect(await codeOf(it.put(name, two, { noClobber: true }))).toBe("exists");
        expect(await codeOf(it.put(name, two, { etag: "other" }))).toBe("changed");
        await it.put(name, three, { etag });
        expect(await codeOf(it.put(name, two, { etag }))).toBe("changed");
        expect((await it.get(name)).content.equals(three)).toBe(true);
      }
    });

    test("of many small files in one go, each acknowledged in its turn", async () => {
      await using it = await start();
      const paths = Array.from({ length: 300 }, (_, index) => `d${index % 7}/f${index}`);
      for (const path of paths) {
        const content = Buffer.from(path);
        const fields = { id: "", offset: 0, size: content.length, mtime: 0, noClobber: false, etag: "", content };
        await it.peer.ask({ action: "put", path, parents: true, ...fields });
      }
      for (const path of paths) expect((await it.peer.expect("meta")).size).toBe(path.length);
      const folders = Array.from({ length: 7 }, (_, index) => `d${index}/`);
      expect(await it.names()).toEqual([...paths, ...folders].sort());
    });

    test("to what cannot have it", async () => {
      await using it = await start();
      await it.put("file", "x");
      await it.mkdir("folder");
      for (const [path, code] of [
        ["", "refused"],
        ["folder", "not_a_file"],
        ["file/f", "not_a_folder"],
        ["nothing/f", "not_found"],
        ["../f", "bad_name"],
        ["a//b", "bad_name"],
        ["a\nb", "bad_name"],
        [".reprise/f", "refused"],
        ["x.part", "refused"],
        ["y".repeat(256), "bad_name"],
      ]) {
        for (const whole of [true, false])
          expect([path, await codeOf(it.put(path!, "y", { whole }))]).toEqual([path, code]);
      }
      expect(await codeOf(it.put("file/f/g", "y", { parents: true }))).toBe("not_a_folder");
      expect(await it.names()).toEqual(["file", "folder/"]);
    });
  });

  describe("folders", () => {
    test("are made, listed, and stay when the last file goes", async () => {
      await using it = await start();
      await it.mkdir("a");
      expect(await codeOf(it.mkdir("a"))).toBe("exists");
      expect(await codeOf(it.mkdir("b/c"))).toBe("not_found");
      await it.mkdir("b/c", true);
      await it.mkdir("b/c", true);
      await it.put("a/f", "f");
      await it.put("d/e/g", "g", { parents: true });
      expect(await it.names()).toEqual(["a/", "a/f", "b/", "b/c/", "d/", "d/e/", "d/e/g"]);
      expect(await it.names("", false)).toEqual(["a/", "b/", "d/"]);
      expect(await it.names("d")).toEqual(["e/", "e/g"]);
      expect(await it.stat("d/e")).toMatchObject({ kind: "folder", size: 0, etag: "" });
      expect(await it.stat("")).toMatchObject({ kind: "folder", size: 0 });
      await it.remove("a/f");
      await it.remove("d/e/g");
      expect(await it.names()).toEqual(["a/", "b/", "b/c/", "d/", "d/e/"]);
      await it.remove("d/e", true);
      expect(await it.names()).toEqual(["a/", "b/", "b/c/", "d/"]);
      expect(await codeOf(it.remove("a"))).toBe("refused");
      await it.remove("b", true);
      expect(await it.names()).toEqual(["a/", "d/"]);
    });

    test("are no files, nor files folders", async () => {
      await using it = await start();
      await it.put("f", "f");
      await it.mkdir("d");
      expect(await codeOf(it.get("d"))).toBe("not_a_file");
      expect(await codeOf(it.list("f"))).toBe("not_a_folder");
      expect(await codeOf(it.mkdir("f"))).toBe("exists");
      expect(await codeOf(it.mkdir("f/g", true))).toBe("not_a_folder");
      expect(await codeOf(it.stat("f/g"))).toBe("not_found");
      for (const path of ["nothing", "d/nothing"]) {
        expect(await codeOf(it.stat(path))).toBe("not_found");
        expect(await codeOf(it.get(path))).toBe("not_found");
        expect(await codeOf(it.list(path))).toBe("not_found");
        expect(await codeOf(it.remove(path))).toBe("not_found");
        expect(await codeOf(it.move(path, "to"))).toBe("not_found");
      }
    });

    test("do not show hidden names, and nobody gets at them", async () => {
      await using it = await start();
      await it.put("f", "f");
      for (const path of [".reprise", ".reprise/lock", ".reprise-x", "a.part", "d/.reprise/x"]) {
        expect(await codeOf(it.stat(path))).toBe("not_found");
        expect(await codeOf(it.get(path))).toBe("not_found");
        expect(await codeOf(it.mkdir(path))).toBe("refused");
        expect(await codeOf(it.move("f", path))).toBe("refused");
      }
      expect(await codeOf(it.remove("", true))).toBe("refused");
      expect(await it.names()).toEqual(["f"]);
    });

    test("of 1,100 files, and as many folders, are listed whole", async () => {
      await using it = await start();
      const paths = Array.from({ length: 1100 }, (_, index) => `d/${index}/f`);
      for (let at = 0; at < paths.length; at += 100) {
        const some = paths.slice(at, at + 100);
        const fields = { id: "", offset: 0, size: 0, mtime: 3, noClobber: false, etag: "", content: Buffer.alloc(0) };
        for (const path of some) await it.peer.ask({ action: "put", path, parents: true, ...fields });
        for (const _ of some) await it.peer.expect("meta");
      }
      const folders = Array.from({ length: 1100 }, (_, index) => `${index}/`);
      expect(await it.names("d", false)).toEqual(folders.toSorted());
      const all = await it.list("d");
      expect(all.length).toBe(2200);
      expect(all.filter(({ kind, mtime }) => kind === "file" && mtime === 3).length).toBe(1100);
      // Who takes a list as it comes has met a folder before what is in it.
      const seen = new Set<string>();
      for (const { path } of all) {
        const above = path.split("/").slice(0, -1).join("/");
        expect(above === "" || seen.has(above)).toBe(true);
        seen.add(path);
      }
    });
  });

  describe("a move", () => {
    test("of a file, with its time", async () => {
      await using it = await start();
      await it.put("d/f", "one", { parents: true, mtime: 11 });
      await it.put("g", "two", { mtime: 12 });
      await it.move("d/f", "f");
      expect(await it.names()).toEqual(["d/", "f", "g"]);
      expect(await codeOf(it.move("f", "g"))).toBe("exists");
      await it.move("f", "g", true);
      expect(await it.stat("g")).toMatchObject({ size: 3, mtime: 11 });
      expect((await it.get("g")).content.toString()).toBe("one");
      await it.move("g", "g", true);
      expect(await codeOf(it.move("g", "d", true))).toBe("not_a_file");
      expect(await codeOf(it.move("g", "nothing/g"))).toBe("not_found");
      expect(await it.names()).toEqual(["d/", "g"]);
    });

    test("of a folder, with all that is in it", async () => {
      await using it = await start();
      for (const name of ["a/f", "a/b/g", "a/b/h", "c/i"]) await it.put(name, name, { parents: true });
      await it.mkdir("a/empty");
      await it.move("a", "d");
      expect(await it.names()).toEqual(["c/", "c/i", "d/", "d/b/", "d/b/g", "d/b/h", "d/empty/", "d/f"]);
      expect((await it.get("d/b/g")).content.toString()).toBe("a/b/g");
      expect(await codeOf(it.move("d", "d/b/x"))).toBe("refused");
      expect(await codeOf(it.move("d", "c"))).toBe("exists");
      expect(await codeOf(it.move("d", "c", true))).toBe("exists");
      await it.move("d/b", "c/b");
      expect(await it.names()).toEqual(["c/", "c/b/", "c/b/g", "c/b/h", "c/i", "d/", "d/empty/", "d/f"]);
    });
  });

  test("a token for a folder leads nowhere else", async () => {
    using folder = makeRoot({});
    const file = `${folder.path}/tokens`;
    const made = (access: string, folder: string) => {
      const args = ["token", "add", `${access}${folder}`, "--tokens", file, "--access", access];
      if (folder !== "") args.push("--folder", folder);
      return Bun.spawnSync([process.execPath, join(HOME, "server.ts"), ...args])
        .stdout.toString()
        .trim();
    };
    const [all, one] = [made("write", ""), made("write", "one")];
    await using it = await start(["--tokens", file]);
    using ofAll = await Talk.to(it.server.port, all);
    {
      using early = await Talk.to(it.server.port, one);
      expect(await codeOf(early.stat(""))).toBe("denied");
    }
    for (const path of ["one/f", "one/d/g", "two/f"]) await ofAll.put(path, path, { parents: true });
    using ofOne = await Talk.to(it.server.port, one);
    expect(await ofOne.names()).toEqual(["d/", "d/g", "f"]);
    expect((await ofOne.get("f")).content.toString()).toBe("one/f");
    await ofOne.put("new", "x");
    await ofOne.move("d", "e");
    expect(await codeOf(ofOne.stat("one/f"))).toBe("not_found");
    expect(await codeOf(ofOne.get("../two/f"))).toBe("bad_name");
    expect(await ofAll.names()).toEqual(["one/", "one/e/", "one/e/g", "one/f", "one/new", "two/", "two/f"]);
  });
});
