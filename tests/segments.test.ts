/** One file over several connections: the right bytes of one version, and after a cut only those that are missing. */
import { describe, expect, setDefaultTimeout, test } from "bun:test";
import {
  appendFileSync,
  closeSync,
  openSync,
  readdirSync,
  readFileSync,
  renameSync,
  writeFileSync,
  writeSync,
} from "node:fs";
import { join } from "node:path";
import { encodeError, encodeMeta, type Meta, RepriseError } from "../protocol.ts";
import type { ResumeLog } from "../resume.ts";
import {
  contentFrames,
  killWorkers,
  makeRoot,
  randomBytes,
  readResumeLog,
  runClient,
  type Server,
  spawnClient,
  startFakeServer,
  startServer,
  TEST_MS,
  temporaryFolder,
  waitFor,
} from "./fixtures.ts";

setDefaultTimeout(TEST_MS);

const MIB = 1024 * 1024;
const big = randomBytes(16 * MIB + 1, 1);
const other = randomBytes(16 * MIB + 1, 2);

/** So slow that a stop of a busy machine is not long enough to miss that a download is under way. */
async function setUp(args: string[] = ["--limit-rate", "1M"]) {
  const root = makeRoot({ big, empty: "", tiny: "x", small: randomBytes(MIB + 7, 3) });
  const folder = temporaryFolder();
  const server = await startServer(root.path, { args });
  return {
    root: root.path,
    folder: folder.path,
    server,
    source: join(root.path, "big"),
    file: join(folder.path, "big"),
    async [Symbol.asyncDispose]() {
      await server[Symbol.asyncDispose]();
      root[Symbol.dispose]();
      folder[Symbol.dispose]();
    },
  };
}
type Place = Awaited<ReturnType<typeof setUp>>;

const gets = (server: Server) => server.log.filter(({ event }) => event === "get");
const isSame = (path: string, content: Uint8Array) => readFileSync(path).equals(content);

const readLog = (it: Place) => readResumeLog(`${it.file}.resume.json`);

const heldBytes = (log: ResumeLog | undefined) =>
  (log?.bytes ?? 0) + (log?.segments ?? []).reduce((sum, { bytes }) => sum + bytes, 0);

/** Starts a download in segments, kills it in the middle, and returns what its log then says. */
async function getAndKill(it: Place, segments: number, signal: NodeJS.Signals = "SIGKILL"): Promise<ResumeLog> {
  const child = spawnClient(it.server.address, ["get", "big", "-d", it.folder, "--segments", String(segments)]);
  await waitFor("bytes have come", () => heldBytes(readLog(it)) > 2 * MIB);
  child.kill(signal);
  expect(await child.exited).toBe(signal === "SIGINT" ? 130 : 137);
  return readLog(it)!;
}

/** Runs the client against a fast server on the same root; returns with all that this server has logged. */
async function finish(it: Place, args: string[]) {
  await using server = await startServer(it.root);
  const run = await runClient(server.address, args);
  await server.stop("SIGTERM");
  return { ...run, sent: gets(server).reduce((sum, { bytes }) => sum + bytes!, 0), gets: gets(server) };
}

describe("--segments", () => {
  test.each([1, 2, 4, 64])("%d: every file is right, also what is too small to be cut", async (segments) => {
    await using it = await setUp([]);
    for (const name of ["big", "empty", "tiny", "small"]) {
      const run = await runClient(it.server.address, ["get", name, "-d", it.folder, "--segments", String(segments)]);
      expect([name, run.status, run.errors]).toEqual([name, 0, ""]);
      expect(isSame(join(it.folder, name), readFileSync(join(it.root, name)))).toBe(true);
    }
    expect(readdirSync(it.folder).sort()).toEqual(["big", "empty", "small", "tiny"]);
    await it.server.stop("SIGTERM");
    const parts = gets(it.server).filter(({ path }) => path === "big");
    expect(parts.length).toBe(Math.min(16, segments));
    expect(parts.reduce((sum, { bytes }) => sum + bytes!, 0)).toBe(big.length);
  });

  test("takes a number from 1 to 64", async () => {
    for (const number of ["0", "65", "x", "-1", "1.5"]) {
      expect((await runClient("127.0.0.1:1", ["get", "big", `--segments=${number}`])).status).toBe(2);
    }
  });

  test("--json says what was done, in the fields of any get", async () => {
    await using it = await setUp([]);
    const run = await runClient(it.server.address, ["get", "big", "-d", it.folder, "--segments", "4", "--json"]);
    const done = JSON.parse(run.output);
    expect(Object.keys(done)).toEqual(["path", "file", "size", "mtime", "etag", "offset", "ms"]);
    expect(done).toMatchObject({ path: "big", file: it.file, size: big.length, offset: 0 });
  });
});

describe("killed in the middle", () => {
  const ways: [string, string[]][] = [
    ["the same", ["--segments", "4"]],
    ["another number", ["--segments", "2"]],
    ["without", []],
  ];
  test.each(ways)("the log names every segment, and a second run (%s) gets what is missing", async (_, args) => {
    await using it = await setUp();
    const log = await getAndKill(it, 4);
    expect(Object.keys(log)).toEqual([
      "command",
      "path",
      "server",
      "etag",
      "size",
      "mtime",
      "bytes",
      "crc32",
      "segments",
    ]);
    expect(log.segments!.length).toBe(3);
    for (const [index, segment] of log.segments!.entries()) {
      expect(Object.keys(segment)).toEqual(["offset", "end", "bytes", "crc32"]);
      expect(segment.end).toBe(log.segments![index + 1]?.offset ?? big.length);
      const held = big.subarray(segment.offset, segment.offset + segment.bytes);
      expect(Bun.hash.crc32(held)).toBe(segment.crc32);
    }
    const run = await finish(it, ["get", "big", "-d", it.folder, ...args]);
    expect(run).toMatchObject({ status: 0, errors: "" });
    expect(run.sent).toBe(big.length - heldBytes(log));
    expect(isSame(it.file, big)).toBe(true);
    expect(readdirSync(it.folder)).toEqual(["big"]);
  });

  test("`resume` and `get -r` go on with it as well", async () => {
    await using it = await setUp();
    for (const args of [
      ["resume", "-d", it.folder],
      ["get", "-r", "/", "-d", it.folder],
    ]) {
      const log = await getAndKill(it, 4, "SIGINT");
      await using server = await startServer(it.root);
      const run = await runClient(server.address, [...args, "--server", server.address]);
      expect(run.status).toBe(0);
      await server.stop("SIGTERM");
      const sent = gets(server).filter(({ path }) => path === "big");
      expect(sent.reduce((sum, { bytes }) => sum + bytes!, 0)).toBe(big.length - heldBytes(log));
      expect(isSame(it.file, big)).toBe(true);
      expect(readdirSync(it.folder).filter((name) => name.startsWith("big"))).toEqual(["big"]);
      Bun.spawnSync(["rm", it.file]);
    }
  });

  test("a whole download that was cut is gone on with in segments", async () => {
    await using it = await setUp();
    const log = await getAndKill(it, 1);
    const run = await finish(it, ["get", "big", "-d", it.folder, "--segments", "4"]);
    expect(run).toMatchObject({ status: 0, sent: big.length - heldBytes(log) });
    expect(run.gets.length).toBe(4);
    expect(isSame(it.file, big)).toBe(true);
  });

  test("both workers, three times: goes on by itself", async () => {
    await using it = await setUp(["--limit-rate", "500K"]);
    const child = spawnClient(it.server.address, ["get", "big", "-d", it.folder, "--segments", "4"]);
    for (let killed = 0, bytes = 0; killed < 3; killed++) {
      const before = bytes;
      bytes = await waitFor("bytes have come", () => [heldBytes(readLog(it))].find((now) => now > before));
      await killWorkers(it.server);
    }
    expect(await child.exited).toBe(0);
    expect(isSame(it.file, big)).toBe(true);
    expect(readdirSync(it.folder)).toEqual(["big"]);
  });

  const damages: [string, (it: Place, log: ResumeLog) => void][] = [
    ["a wrong byte in the last segment", (it, log) => overwrite(`${it.file}.part`, log.segments!.at(-1)!.offset + 10)],
    ["a wrong byte in the first", (it) => overwrite(`${it.file}.part`, 10)],
    ["a log with a gap", (it, log) => writeLog(it, { ...log, segments: log.segments!.toSpliced(1, 1) })],
    ["a log of overlapping segments", (it, log) => writeLog(it, { ...log, segments: log.segments!.toReversed() })],
  ];
  test.each(damages)("%s: said, the part kept aside, the file right", async (_, damage) => {
    await using it = await setUp();
    const log = await getAndKill(it, 4);
    damage(it, log);
    const part = readFileSync(`${it.file}.part`);
    const run = await finish(it, ["get", "big", "-d", it.folder, "--segments", "4"]);
    expect(run.status).toBe(0);
    expect(isSame(it.file, big)).toBe(true);
    expect(run.errors).toContain("the old part is kept as");
    expect(isSame(join(it.folder, "big.aside-1.part"), part)).toBe(true);
    expect(run.sent).toBe(big.length);
  });

  function overwrite(path: string, at: number): void {
    const fd = openSync(path, "r+");
    writeSync(fd, Uint8Array.of(readFileSync(path)[at]! ^ 1), 0, 1, at);
    closeSync(fd);
  }
  function writeLog(it: Place, log: ResumeLog): void {
    writeFileSync(`${it.file}.resume.json`, JSON.stringify(log));
  }
});

describe("changed on the server", () => {
  test("between two runs: said, and all of the new version comes", async () => {
    await using it = await setUp();
    await getAndKill(it, 4);
    writeFileSync(it.source, other);
    const run = await finish(it, ["get", "big", "-d", it.folder, "--segments", "4"]);
    expect(run).toMatchObject({ status: 0, sent: other.length });
    expect(run.errors).toContain("starting again");
    expect(isSame(it.file, other)).toBe(true);
    expect(readdirSync(it.folder)).toEqual(["big"]);
  });

  const ways: [string, (source: string) => void][] = [
    ["overwritten", (source) => writeFileSync(source, other)],
    ["made longer", (source) => appendFileSync(source, "more")],
    [
      "replaced by a rename",
      (source) => {
        writeFileSync(`${source}.new`, other);
        renameSync(`${source}.new`, source);
      },
    ],
  ];
  test.each(ways)("in the middle, %s: one version, never a mixture", async (_, change) => {
    await using it = await setUp();
    const child = spawnClient(it.server.address, ["get", "big", "-d", it.folder, "--segments", "4"]);
    await waitFor("bytes have come", () => heldBytes(readLog(it)) > MIB);
    change(it.source);
    expect(await child.exited).toBe(0);
    expect(isSame(it.file, readFileSync(it.source)) || isSame(it.file, big)).toBe(true);
    expect(readdirSync(it.folder)).toEqual(["big"]);
  });

  test("before the first segment has a byte, while the others still get the old version", async () => {
    const [old, now] = ["o", "n"].map((letter) => letter.repeat(4 * MIB)) as [string, string];
    const metaOf = (etag: string): Meta => ({ kind: "file", size: old.length, mtime: 1e15, etag });
    let stats = 0;
    let firstAgain = false;
    using folder = temporaryFolder();
    using server = startFakeServer(async (request) => {
      if (request.action === "stat") return [encodeMeta(metaOf(++stats === 1 ? "old" : "now"))];
      if (request.action !== "get") return [encodeError(new RepriseError("refused"))];
      const { offset, length, etag } = request;
      if (etag !== "old") {
        firstAgain = true;
        return [encodeMeta(metaOf("now"), offset), ...contentFrames(now.slice(offset, offset + length))];
      }
      if (offset === 0) return [encodeError(new RepriseError("changed"))];
      await waitFor("the first segment is dealt with", () => firstAgain || stats > 1);
      return [encodeMeta(metaOf("old"), offset), ...contentFrames(old.slice(offset, offset + length))];
    });
    const run = await runClient(server.address, ["get", "x", "-d", folder.path, "--segments", "4"]);
    expect(run.status).toBe(0);
    expect(readFileSync(join(folder.path, "x"), "utf8") === now).toBe(true);
  });
});
