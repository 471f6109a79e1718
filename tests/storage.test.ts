/** Nothing escapes a root, with openat2 and without, and a file is read as one version or not at all. */
import { afterAll, beforeAll, describe, expect, setDefaultTimeout, test } from "bun:test";
import { spawnSync } from "node:child_process";
import {
  appendFileSync,
  closeSync,
  existsSync,
  mkdirSync,
  openSync,
  renameSync,
  rmSync,
  symlinkSync,
  truncateSync,
  utimesSync,
  writeFileSync,
  writeSync,
} from "node:fs";
import { join } from "node:path";
import { crc32 } from "node:zlib";
import { libc } from "../libc.ts";
import type { ErrorCode } from "../protocol.ts";
import { openFolder, type Root } from "../storage.ts";
import { HOME, randomBytes, TEST_MS, temporaryFolder } from "./fixtures.ts";

setDefaultTimeout(TEST_MS);

const folder = temporaryFolder();
const path = join(folder.path, "root");
const content = randomBytes(1_000_003);
let root: Root;

beforeAll(() => {
  mkdirSync(join(path, "sub", "deeper"), { recursive: true });
  mkdirSync(join(path, ".reprise"));
  mkdirSync(join(folder.path, "rootb"));
  writeFileSync(join(folder.path, "rootb", "secret"), "twin");
  writeFileSync(join(folder.path, "secret"), "outside");
  writeFileSync(join(path, "file"), content);
  writeFileSync(join(path, "empty"), "");
  writeFileSync(join(path, "sub", "a b é 🎈.txt"), "name");
  writeFileSync(join(path, "sub", "deeper", "x"), "x");
  writeFileSync(join(path, "upload.part"), "unfinished");
  writeFileSync(join(path, ".reprise", "ledger"), "own");
  writeFileSync(join(path, "new\nline"), "never listed");
  symlinkSync("../secret", join(path, "link-out"));
  symlinkSync("/etc/passwd", join(path, "link-absolute"));
  symlinkSync("file", join(path, "link-in"));
  symlinkSync("..", join(path, "link-up"));
  symlinkSync("sub", join(path, "link-folder"));
  spawnSync("mkfifo", [join(path, "fifo")]);
  root = openFolder(path);
});
afterAll(() => {
  root.close();
  folder[Symbol.dispose]();
});

async function codeOf(promise: Promise<unknown>): Promise<ErrorCode | "ok"> {
  return promise.then(
    () => "ok" as const,
    (error) => error.code,
  );
}

/** The cases, as `name code` pairs; run here with openat2 and in a process of its own without the C library. */
const refused: [string, ErrorCode][] = [
  ["../secret", "bad_name"],
  ["sub/../../secret", "bad_name"],
  ["/etc/passwd", "bad_name"],
  ["..", "bad_name"],
  ["../rootb/secret", "bad_name"],
  ["sub//deeper", "bad_name"],
  ["file\0", "bad_name"],
  ["link-out", "refused"],
  ["link-absolute", "refused"],
  ["link-in", "refused"],
  ["fifo", "refused"],
  [".reprise/ledger", "not_found"],
  [".reprise", "not_found"],
  ["upload.part", "not_found"],
  ["nothing", "not_found"],
  ["file/below", "not_found"],
  ["%2e%2e/secret", "not_found"],
  ["..\\secret", "not_found"],
  ["sub", "not_a_file"],
  ["", "not_a_file"],
];

describe("open() refuses", () => {
  test("(the C library is there, so this is openat2)", () => expect(libc()).not.toBeNull());
  test.each(refused)("%j with %s", async (name, code) => {
    expect(await codeOf(root.open(name))).toBe(code);
  });
  test.each(["link-up/secret", "link-folder/deeper/x"])("%j: a link on the way", async (name) => {
    expect(["refused", "not_found"]).toContain(await codeOf(root.open(name)));
  });
});

test("the same without the C library, by a walk from descriptor to descriptor", () => {
  const cases = [...refused, ["link-up/secret", "not_found"], ["link-folder/deeper/x", "not_found"]];
  const script = `
    import { libc } from "${HOME}/libc.ts";
    import { openFolder } from "${HOME}/storage.ts";
    if (libc() !== null) throw new Error("the C library is in use");
    const root = openFolder(${JSON.stringify(path)});
    for (const [name, code] of ${JSON.stringify(cases)}) {
      const found = await root.open(name).then(() => "ok", (error) => error.code);
      if (found !== code) throw new Error(JSON.stringify(name) + ": " + found + " instead of " + code);
    }
    const file = await root.open("sub/deeper/x");
    console.log(Buffer.from(await file.read(0, 1)).toString(), (await root.open("file")).meta.size);`;
  const { stdout, stderr } = spawnSync(process.execPath, ["-e", script], { env: { ...process.env, REPRISE_FFI: "0" } });
  expect(`${stdout}${stderr}`).toBe("x 1000003\n");
});

describe("list()", () => {
  test("shows files and folders, and neither hidden names nor links nor devices", async () => {
    const names = (await Array.fromAsync(root.list("", false))).flat().map((entry) => `${entry.kind} ${entry.path}`);
    expect(names.sort()).toEqual(["file empty", "file file", "folder sub"]);
  });
  test("goes into the folders below (recursive)", async () => {
    const names = (await Array.fromAsync(root.list("", true))).flat().map((entry) => entry.path);
    expect(names.sort()).toEqual(["empty", "file", "sub", "sub/a b é 🎈.txt", "sub/deeper", "sub/deeper/x"]);
  });
  test("leaves out what is too long to ask for, and goes on", async () => {
    const chdir = `cd ${path}/sub && for i in $(seq 20); do mkdir ${"d".repeat(250)} && cd ${"d".repeat(250)} || exit 1; done; touch end`;
    spawnSync("sh", ["-c", chdir]);
    const names = (await Array.fromAsync(root.list("", true))).flat().map((entry) => entry.path);
    expect(names).toContain("sub/deeper/x");
    expect(Math.max(...names.map((name) => Buffer.byteLength(name)))).toBeLessThanOrEqual(4096);
    spawnSync("rm", ["-rf", join(path, "sub", "d".repeat(250))]);
  });

  test("refuses a file, a link and what is not there", async () => {
    expect(await codeOf(Array.fromAsync(root.list("file", false)))).toBe("not_a_folder");
    expect(["refused", "not_found", "not_a_folder"]).toContain(
      await codeOf(Array.fromAsync(root.list("link-folder", false))),
    );
    expect(await codeOf(Array.fromAsync(root.list("no", false)))).toBe("not_found");
  });
});

/** Where 200,000 files are made in a second; a disk takes ten. */
const MEMORY = existsSync("/dev/shm") ? "/dev/shm" : undefined;

/** What listings in a process of their own begin with, with the C library or without. */
const LIST_SCRIPT = `
  import { readFileSync } from "node:fs";
  import { folderCalls } from "${HOME}/libc.ts";
  import { openFolder } from "${HOME}/storage.ts";
  if ((folderCalls() === null) !== (process.env.REPRISE_FFI === "0")) throw new Error("not the way that was asked for");
  const peakBytes = () => Number(/VmHWM:\\s+(\\d+)/.exec(readFileSync("/proc/self/status", "utf8"))[1]) * 1024;
  const root = openFolder(process.argv[1]);
  const entriesOf = async (path) => (await Array.fromAsync(root.list(path, true))).flat();`;

function listingProcess(script: string, root: string, ffi: "0" | "1", limits = ":"): string {
  const command = ["-c", `${limits}; exec "$0" -e "$1" "$2"`, process.execPath, LIST_SCRIPT + script, root];
  const { stdout, stderr } = spawnSync("sh", command, {
    env: { ...process.env, REPRISE_FFI: ffi },
    maxBuffer: 64 * 1024 * 1024,
  });
  expect(`${stderr}`).toBe("");
  return `${stdout}`;
}

function makeFiles(folder: string, count: number): void {
  mkdirSync(folder, { recursive: true });
  for (let number = 0; number < count; number++) closeSync(openSync(join(folder, `file-${number}`), "w"));
}

describe.each(["1", "0"] as const)("list() of odd things (REPRISE_FFI=%s)", (ffi) => {
  const odd = temporaryFolder(MEMORY);
  afterAll(() => odd[Symbol.dispose]());

  /** A file has as many bytes as its name has characters. Names to be left out are given as latin1. */
  const shown = [
    "a b",
    "ünï",
    "e\u0301",
    "\ufeffbom",
    "\ufffd",
    "a\ufffd",
    "🎈",
    "x.party",
    "..x",
    "-",
    "\\",
    "\t",
    "\x1b",
  ];
  const long = ["n".repeat(255), "é".repeat(127), "🎈".repeat(63)];
  const leftOut = ["a\n", "\r", "a.part", ".part", "\xff", "a\xff", "a\xe9b", "\xed\xa0\x80", "\xc0\xaf"];

  test("every name that can be asked for is there once, and no other", async () => {
    const path = join(odd.path, "names");
    mkdirSync(join(path, "empty", "empty"), { recursive: true });
    mkdirSync(join(path, ".reprise"));
    mkdirSync(join(path, "hidden.part"));
    for (const name of [...shown, ...long]) writeFileSync(join(path, name), "x".repeat(name.length));
    for (const name of leftOut) writeFileSync(Buffer.from(`${path}/${name}`, "latin1"), "left out");
    for (const name of [".reprise/own", "hidden.part/own"]) writeFileSync(join(path, name), "left out");
    symlinkSync("a b", join(path, "link"));
    symlinkSync("empty", join(path, "link-to-folder"));
    symlinkSync("nowhere", join(path, "link-to-nothing"));
    spawnSync("mkfifo", [join(path, "fifo")]);
    for (const name of [...shown, ...long, "empty/empty", "empty"]) utimesSync(join(path, name), 1, 1);

    const found = JSON.parse(listingProcess("console.log(JSON.stringify(await entriesOf('')));", path, ffi));
    const files = [...shown, ...long].map((name) => ({ kind: "file", size: name.length, path: name }));
    const folders = ["empty", "empty/empty"].map((name) => ({ kind: "folder", size: 0, path: name }));
    const expected = [...files, ...folders].map((entry) => ({ ...entry, mtime: 1_000_000 }));
    const byPath = (a: { path: string }, b: { path: string }) => (a.path < b.path ? -1 : 1);
    expect(found.sort(byPath)).toEqual(expected.sort(byPath));
  });

  test("sizes and times are those of stat(), what no frame can carry is left out", async () => {
    const path = join(odd.path, "numbers");
    mkdirSync(path);
    const first = "1960-01-01T00:00:00.123456789Z";
    const last = "3000-01-01T00:00:00Z";
    const times = [
      first,
      "1969-12-31T23:59:59.999999999Z",
      "1970-01-01T00:00:00Z",
      "2001-02-03T04:05:06.0000019Z",
      last,
    ];
    const sizes = ["0", "4294967295", "4294967296", "1099511627777"];
    for (const time of times) spawnSync("touch", ["-d", time, join(path, time)]);
    for (const size of sizes) spawnSync("truncate", ["-s", size, join(path, size)]);
    const script = `
      const entries = new Map((await entriesOf("")).map((entry) => [entry.path, entry]));
      for (const name of ${JSON.stringify([...times, ...sizes])}) {
        const entry = entries.get(name);
        const stat = await root.stat(name).catch((error) => error);
        const same = entry ? stat.size === entry.size && stat.mtime === entry.mtime : stat.code === "refused";
        if (!same) throw new Error(name + " is " + JSON.stringify([entry, stat]));
      }
      entries.delete("${last}");
      console.log(entries.size, entries.get("${first}").mtime);`;
    expect(listingProcess(script, path, ffi)).toBe("8 -315619199876543\n");
  });

  test("10,000 entries in one folder, and as many in folders a hundred deep, are each there once", () => {
    const path = join(odd.path, "many");
    makeFiles(join(path, "wide"), 10_000);
    for (let depth = 0, at = path; depth < 100; depth++, at = join(at, "d")) makeFiles(at, 100);
    const script = `
      const paths = (await entriesOf("")).map(({ path }) => path);
      console.log(paths.length, new Set(paths).size, Math.max(...paths.map((path) => path.split("/").length)));`;
    expect(listingProcess(script, path, ffi)).toBe("20100 20100 100\n");
  });

  test("a listing that runs out of descriptors fails rather than being short, and leaves none open", () => {
    const path = join(odd.path, "deep");
    mkdirSync(join(path, ...Array(60).fill("d")), { recursive: true });
    const script = `
      import { closeSync, openSync, readdirSync } from "node:fs";
      const open = () => readdirSync("/proc/self/fd").length;
      await entriesOf("d/".repeat(59) + "d");
      const before = open();
      const taken = [];
      // From now on there are not even those that a listing needs.
      if (process.env.USE_UP) try { for (;;) taken.push(openSync("/dev/null")); } catch {}
      console.log(await entriesOf("").then((entries) => entries.length, (error) => error.code));
      for (const fd of taken) closeSync(fd);
      console.log(open() - before);`;
    expect(listingProcess(script, path, ffi, "export USE_UP=1; ulimit -n 60")).toBe("failed\n0\n");
    expect(listingProcess(script, path, ffi)).toBe("60\n0\n");
  });

  test("a tree 600 folders deep costs a listing no more descriptors than one folder", () => {
    const path = join(odd.path, "deepest");
    mkdirSync(join(path, ...Array(600).fill("d")), { recursive: true });
    const script = `
      import { readdirSync } from "node:fs";
      const before = readdirSync("/proc/self/fd").length;
      let most = 0, count = 0;
      for await (const entries of root.list("", true)) {
        count += entries.length;
        most = Math.max(most, readdirSync("/proc/self/fd").length);
      }
      console.log(count, most - before < 8 ? "few" : most - before);`;
    expect(listingProcess(script, path, ffi)).toBe("600 few\n");
  });

  test("more folders than are known ahead, beside files and with folders in them, are each there once", () => {
    const path = join(odd.path, "ahead");
    for (let number = 0; number < 3_500; number++) {
      mkdirSync(join(path, `folder-${number}`, "below"), { recursive: true });
      writeFileSync(join(path, `file-${number}`), "");
    }
    const script = `
      const paths = (await entriesOf("")).map(({ path }) => path);
      console.log(paths.length, new Set(paths).size);`;
    expect(listingProcess(script, path, ffi)).toBe("10500 10500\n");
  });
});

describe("list() of 200,000 entries", () => {
  const large = temporaryFolder(MEMORY);
  beforeAll(() => makeFiles(large.path, 200_000));
  afterAll(() => large[Symbol.dispose]());

  test("gives the first before it has read the last, and little memory goes into it", () => {
    const script = `
      const before = peakBytes();
      for await (const entries of root.list("", false)) {
        console.log(JSON.stringify({ first: entries.length, bytes: peakBytes() - before }));
        break;
      }`;
    const { first, bytes } = JSON.parse(listingProcess(script, large.path, "1"));
    expect(first).toBeWithin(1, 20_000);
    // 4.6 MB were seen; all the names at once are 30 MB.
    expect(bytes).toBeLessThan(15_000_000);
  });

  test.each(["1", "0"] as const)("lets others run meanwhile (REPRISE_FFI=%s)", (ffi) => {
    const script = `
      let turns = 0;
      let count = 0;
      const tick = () => { turns++; if (count < 200_000) setImmediate(tick); };
      for await (const entries of root.list("", false)) {
        if (count === 0) tick();
        count += entries.length;
      }
      console.log(count, turns);`;
    const [count, turns] = listingProcess(script, large.path, ffi).split(" ").map(Number);
    expect(count).toBe(200_000);
    expect(turns).toBeGreaterThan(20);
  });
});

describe("a file", () => {
  test("is read whole, with the checksum of any part", async () => {
    const file = await root.open("file");
    expect(Buffer.from(await file.read(0, content.length)).equals(content)).toBe(true);
    for (const [from, length] of [
      [0, content.length],
      [1, 300_000],
      [262_144, 262_144],
      [999_999, 4],
    ] as const) {
      const sum = crc32(content.subarray(from, from + length));
      expect(await file.checksum(from, length)).toBe(sum);
      // The second time from what was kept.
      expect(await file.checksum(from, length)).toBe(sum);
    }
    file.close();
  });

  test("has an etag that every change changes", async () => {
    const name = join(path, "versions");
    const seen = new Set<string>();
    const changes = [
      () => writeFileSync(name, "aaaa"),
      () => writeFileSync(name, "bbbb"),
      () => appendFileSync(name, "c"),
      () => truncateSync(name, 2),
      () => utimesSync(name, 1, 1),
      () => {
        writeFileSync(`${name}-new`, "aa");
        renameSync(`${name}-new`, name);
      },
    ];
    for (const change of changes) {
      change();
      seen.add((await root.stat("versions")).etag);
    }
    expect(seen.size).toBe(changes.length);
    rmSync(name);
  });

  test("that changes right after it was written and opened is still noticed (50 times)", async () => {
    const name = join(path, "quick");
    for (let round = 0; round < 50; round++) {
      writeFileSync(name, "aaaa");
      const file = await root.open("quick");
      const fd = openSync(name, "r+");
      writeSync(fd, "bbbb");
      closeSync(fd);
      expect(await codeOf(file.read(0, 4))).toBe("changed");
      file.close();
    }
    rmSync(name);
  });

  const changes: [string, (name: string) => void][] = [
    ["overwritten in place", (name) => writeSync(openSync(name, "r+"), "X")],
    ["made shorter", (name) => truncateSync(name, 10)],
    ["made longer", (name) => appendFileSync(name, "more")],
  ];
  test.each(changes)("is `changed` for every way of reading, once it is %s", async (_, change) => {
    const name = join(path, "victim");
    writeFileSync(name, content);
    const file = await root.open("victim");
    await file.checksum(0, content.length);
    change(name);
    expect(await codeOf(file.read(0, 100))).toBe("changed");
    expect(await codeOf(file.checksum(0, content.length))).toBe("changed");
    expect(() => file.verify()).toThrow("changed on the server");
    file.close();
    rmSync(name);
  });

  test("replaced by a rename, or removed, is still the old version, whole, to who has it open", async () => {
    const name = join(path, "renamed");
    writeFileSync(name, "old version");
    const file = await root.open("renamed");
    writeFileSync(`${name}-2`, "new");
    renameSync(`${name}-2`, name);
    expect(Buffer.from(await file.read(0, 11)).toString()).toBe("old version");
    expect((await root.stat("renamed")).etag).not.toBe(file.meta.etag);
    file.close();
    rmSync(name);
  });
});
