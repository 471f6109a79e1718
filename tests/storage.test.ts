/** Nothing escapes a root, with openat2 and without, and a file is read as one version or not at all. */
import { afterAll, beforeAll, describe, expect, setDefaultTimeout, test } from "bun:test";
import { spawnSync } from "node:child_process";
import {
  appendFileSync,
  closeSync,
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

async function race(open: () => Promise<unknown>, name: string): Promise<number> {
  const swap = `
    const { renameSync, symlinkSync, writeFileSync, rmSync } = require("node:fs");
    process.chdir(${JSON.stringify(path)});
    process.stdout.write("go");
    for (;;) {
      writeFileSync("swap-new", "inside"); renameSync("swap-new", "${name}");
      symlinkSync("../secret", "swap-new"); renameSync("swap-new", "${name}");
    }`;
  const child = Bun.spawn([process.execPath, "-e", swap], { stdio: ["ignore", "pipe", "inherit"] });
  try {
    await child.stdout.getReader().read();
    let inside = 0;
    for (let round = 0; round < 5_000; round++) {
      const found = await open().catch(() => undefined);
      if (found === undefined) continue;
      expect(found).toBe("inside");
      inside++;
    }
    return inside;
  } finally {
    child.kill();
    await child.exited;
    rmSync(join(path, name), { force: true });
    rmSync(join(path, "swap-new"), { force: true });
  }
}

test("a name swapped for a link while it is opened never leads outside (5,000 races)", async () => {
  const inside = await race(async () => {
    const file = await root.open("swapped");
    try {
      return Buffer.from(await file.read(0, file.meta.size)).toString();
    } finally {
      file.close();
    }
  }, "swapped");
  expect(inside).toBeGreaterThan(0);
});

describe("list()", () => {
  test("shows files and folders, and neither hidden names nor links nor devices", async () => {
    const names = (await Array.fromAsync(root.list("", false))).map((entry) => `${entry.kind} ${entry.path}`);
    expect(names.sort()).toEqual(["file empty", "file file", "folder sub"]);
  });
  test("goes into the folders below (recursive)", async () => {
    const names = (await Array.fromAsync(root.list("", true))).map((entry) => entry.path);
    expect(names.sort()).toEqual(["empty", "file", "sub", "sub/a b é 🎈.txt", "sub/deeper", "sub/deeper/x"]);
  });
  test("leaves out what is too long to ask for, and goes on", async () => {
    const chdir = `cd ${path}/sub && for i in $(seq 20); do mkdir ${"d".repeat(250)} && cd ${"d".repeat(250)} || exit 1; done; touch end`;
    spawnSync("sh", ["-c", chdir]);
    const names = (await Array.fromAsync(root.list("", true))).map((entry) => entry.path);
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
