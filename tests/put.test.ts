/** Uploads and other changes: whole, resumed, refused, and never seen half. */
import { describe, expect, setDefaultTimeout, test } from "bun:test";
import {
  appendFileSync,
  chmodSync,
  chownSync,
  closeSync,
  existsSync,
  mkdirSync,
  openSync,
  readdirSync,
  readFileSync,
  readlinkSync,
  rmSync,
  statSync,
  symlinkSync,
  truncateSync,
  utimesSync,
  writeFileSync,
  writeSync,
} from "node:fs";
import { join } from "node:path";
import { tryLock } from "../disk.ts";
import {
  type Answer,
  decodeAnswer,
  type ErrorCode,
  encodeDataHeader,
  encodeEnd,
  encodeError,
  encodeHello,
  encodeRequest,
  encodeWelcome,
  FrameDecoder,
  FrameType,
  MAX_ANSWER_BYTES,
  MAX_CONTENT_BYTES,
  MAX_REQUEST_BYTES,
  type Meta,
  type Put,
  RepriseError,
  type Request,
  SUM_BYTES,
  UNKNOWN_SIZE,
} from "../protocol.ts";
import { Remote } from "../remote.ts";
import { LOG_SUFFIX, type ResumeLog, type Target } from "../resume.ts";
import type { Source } from "../source.ts";
import { startProxy } from "./faults/proxy.ts";
import {
  type ClientOptions,
  connectRaw,
  isAlive,
  killHard,
  killWorkers,
  type LogLine,
  makeRoot,
  mountSmall,
  namesBelow,
  type RawConnection,
  randomBytes,
  readResumeLog,
  runClient,
  type Server,
  type ServerOptions,
  seeded,
  sizeOf,
  spawnClient,
  spawnFedClient,
  startServer,
  TEST_MS,
  temporaryFolder,
  waitFor,
  writeLargeFile,
} from "./fixtures.ts";

setDefaultTimeout(TEST_MS);

const WITHOUT_FFI = { REPRISE_FFI: "0" };

interface Place extends AsyncDisposable {
  root: string;
  server: Server;
  /** Of a proxy before the server. */
  address: string;
  /** What is beyond so many bytes of a connection goes nowhere. */
  limit: number;
  /** Holds what is put, and nothing else once it is put. */
  folder: string;
  /** For the client's logs. */
  logs: string;
  /** Makes a local file and returns its name. */
  source(name: string, content: Uint8Array | string): string;
  put(...args: string[]): ReturnType<typeof runClient>;
  /** Of the server's log. */
  puts(): LogLine[];
}

async function setUp(options: ServerOptions & { root?: string } = {}): Promise<Place> {
  const root = makeRoot({});
  const folder = temporaryFolder();
  const path = options.root ?? root.path;
  const args = ["--writable", ...(options.args ?? [])];
  const server = await startServer(path, { ...options, args });
  const logs = join(folder.path, "logs");
  const proxy = startProxy({
    target: server.port,
    toServer: (bytes, at) => bytes.subarray(0, Math.max(0, it.limit - at)),
  });
  const it: Place = {
    root: path,
    server,
    address: proxy.address,
    limit: Number.POSITIVE_INFINITY,
    folder: folder.path,
    logs,
    source(name, content) {
      const file = join(folder.path, name);
      mkdirSync(join(file, ".."), { recursive: true });
      writeFileSync(file, content);
      return file;
    },
    put: (...args) => runClient(proxy.address, ["put", "-d", logs, ...args], { env: options.env ?? {} }),
    puts: () => server.log.filter((line) => line.event === "put"),
    async [Symbol.asyncDispose]() {
      proxy[Symbol.dispose]();
      await server[Symbol.asyncDispose]();
      root[Symbol.dispose]();
      folder[Symbol.dispose]();
    },
  };
  return it;
}

const digestOf = (path: string) => new Bun.CryptoHasher("sha256").update(readFileSync(path)).digest("hex");
const staging = (it: Place, name = "") => join(it.root, ".reprise", name);
const staged = (it: Place) => readdirSync(staging(it)).filter((name) => name !== "lock");
const visible = (it: Place) => namesBelow(it.root).filter((name) => !/^\.reprise/.test(name));
/** Of what is staged, how much is held. */
const heldBytes = (it: Place) => {
  const [name] = staged(it).filter((name) => name.startsWith("put-") && !name.endsWith(".lock"));
  return name ? sizeOf(staging(it, name)) : 0;
};
/** The so-manieth put that was done; the line may come later than the client's end. */
const donePut = (it: Place, count = 1) =>
  waitFor(`${count} puts are logged`, () => it.puts().filter(({ status }) => status === "ok")[count - 1]);
const logNames = (it: Place) => (existsSync(it.logs) ? readdirSync(it.logs) : []);

/** Just these files are there, and nothing is left of making them; what was removed goes while others are served. */
async function expectOnly(it: Place, ...names: string[]): Promise<void> {
  expect(visible(it).sort()).toEqual(names.sort());
  await waitFor("nothing is left of it", () => staged(it).length === 0);
  expect(logNames(it)).toEqual([]);
}

function readLog(it: Place): ResumeLog | undefined {
  const [name] = logNames(it).filter((name) => name.endsWith(LOG_SUFFIX));
  return name ? readResumeLog(join(it.logs, name)) : undefined;
}

const mtimeOf = (path: string) => Number(statSync(path, { bigint: true }).mtimeNs / 1000n);

describe("put", () => {
  test.each([1_700_000_000_123_456, 0, -1, -1_000_001, -86_399_999_999])("content and the time %d", async (mtime) => {
    await using it = await setUp();
    const file = it.source("f", randomBytes(100_000));
    const time = mtime < 0 ? String((mtime - 0.5) / 1e6) : (mtime + 0.25) / 1e6;
    utimesSync(file, time, time);
    expect(mtimeOf(file)).toBe(mtime);
    expect(await it.put(file)).toMatchObject({ status: 0, output: "", errors: "" });
    expect(digestOf(join(it.root, "f"))).toBe(digestOf(file));
    expect(mtimeOf(join(it.root, "f"))).toBe(mtime);
    expect((await it.put(file)).errors).toContain("is on the server already");
    await expectOnly(it, "f");
    await it.server.stop("SIGINT");
    expect(it.puts().length).toBe(1);
  });

  test.each([0, 1, MAX_CONTENT_BYTES - 1, MAX_CONTENT_BYTES, MAX_CONTENT_BYTES + 1, 5_000_000])(
    "a file of %d bytes",
    async (size) => {
      await using it = await setUp();
      const file = it.source("f", randomBytes(size));
      expect(await it.put(file)).toMatchObject({ status: 0, errors: "" });
      expect(digestOf(join(it.root, "f"))).toBe(digestOf(file));
      await expectOnly(it, "f");
    },
  );

  test("-t NAME, -t FOLDER, -t FOLDER/, -t FOLDER/NAME, -t /, and several", async () => {
    await using it = await setUp();
    mkdirSync(join(it.root, "d"));
    const [a, b] = [it.source("a", "a"), it.source("b", "b")];
    const runs = [
      [a, "-t", "x"],
      [a, "-t", "d"],
      [b, "-t", "d/"],
      [a, "-t", "d/y"],
      [b, "-t", "/"],
      [a, b, "-t", "d/"],
    ];
    for (const args of runs) expect(await it.put(...args)).toMatchObject({ status: 0 });
    await expectOnly(it, "b", "d", "d/a", "d/b", "d/y", "x");
    for (const [name, content] of Object.entries({ b: "b", "d/a": "a", "d/b": "b", "d/y": "a", x: "a" }))
      expect(readFileSync(join(it.root, name), "utf8")).toBe(content);
    const missing = await it.put(a, "-t", "none/");
    expect(missing.status).toBe(3);
    expect(missing.errors).toContain("mkdir -p");
    expect((await it.put(a, b, "-t", "x")).status).toBe(4);
  });

  test("two sources with one name there are refused before anything moves", async () => {
    await using it = await setUp();
    const files = [it.source("one/f", "1"), it.source("two/f", "2"), it.source("g", "g")];
    const run = await it.put(...files);
    expect(run.status).toBe(2);
    expect(run.errors).toContain('would both be written to "f"');
    await expectOnly(it);
    await it.server.stop("SIGINT");
    expect(it.puts()).toEqual([]);
  });

  test("one of several that fails: its own line, the others go on, its status", async () => {
    await using it = await setUp();
    mkdirSync(join(it.root, "b"));
    const files = ["a", "b", "c"].map((name) => it.source(name, name));
    const run = await it.put(...files, join(it.folder, "none"));
    expect(run.status).toBeGreaterThan(2);
    expect(run.errors).toContain('"b" is in the way on the server');
    expect(run.errors).toContain('none": it is not there');
    await expectOnly(it, "a", "b", "c");
  });

  test("--json prints one object for each: its fields", async () => {
    await using it = await setUp();
    const [a, b] = [it.source("a", "aa"), it.source("b", randomBytes(MAX_CONTENT_BYTES * 2))];
    const one = JSON.parse((await it.put(a, "--json", "-t", "x")).output);
    expect(Object.keys(one)).toEqual(["path", "file", "size", "mtime", "etag", "offset", "ms"]);
    const { etag } = JSON.parse((await runClient(it.server.address, ["stat", "x", "--json"])).output);
    const mtime = expect.stringMatching(/^\d{4}-\d\d-\d\dT[\d:]{8}\.\d{6}Z$/);
    expect(one).toEqual({ path: "x", file: a, size: 2, mtime, etag, offset: 0, ms: expect.any(Number) });
    const both = (await it.put(a, b, "--json")).output.trim().split("\n");
    expect(both.map((line) => Object.keys(JSON.parse(line)))).toEqual([Object.keys(one), Object.keys(one)]);
    expect(new Set(both.map((line) => JSON.parse(line).path))).toEqual(new Set(["a", "b"]));
    const again = JSON.parse((await it.put(b, "--json")).output);
    expect(again).toMatchObject({ path: "b", offset: MAX_CONTENT_BYTES * 2, size: MAX_CONTENT_BYTES * 2 });
    const piped = await runClient(it.server.address, ["put", "-", "-t", "p", "--json"], { stdin: "piped" });
    expect(JSON.parse(piped.output)).toMatchObject({ path: "p", file: "-", size: 5, offset: 0 });
  });

  test("the mode of a file that is replaced stays", async () => {
    await using it = await setUp();
    writeFileSync(join(it.root, "f"), "old");
    chmodSync(join(it.root, "f"), 0o604);
    expect((await it.put(it.source("f", "the new"))).status).toBe(0);
    expect(readFileSync(join(it.root, "f"), "utf8")).toBe("the new");
    expect(statSync(join(it.root, "f")).mode & 0o777).toBe(0o604);
  });

  test("a name of 255 bytes, also resumed; one of 256 is refused", async () => {
    await using it = await setUp();
    const file = it.source("é".repeat(127), randomBytes(1_000_000));
    expect((await it.put(file)).status).toBe(0);
    expect((await it.put(file, "-t", "a".repeat(255))).status).toBe(0);
    const run = await it.put(file, "-t", "a".repeat(256));
    expect(run.status).toBe(4);
    expect(run.errors).toContain("at most 255 bytes");
    await expectOnly(it, "é".repeat(127), "a".repeat(255));
  });

  test("what may not be put there, or cannot be read here: a status and a line for each", async () => {
    await using it = await setUp();
    mkdirSync(join(it.root, "d"));
    writeFileSync(join(it.root, "file"), "x");
    const small = it.source("small", "x");
    const large = it.source("large", randomBytes(2_000_000));
    const bad: [string, number, string][] = [
      ["file/x", 4, '"file", and so there is no'],
      ["none/x", 3, 'the folder "none" for "none/x"; mkdir -p makes it'],
      [".reprise/x", 4, "a name that the server keeps to itself"],
      ["x.part", 4, "a name that the server keeps to itself"],
      ["../x", 4, "is not a name below the served folder"],
      ["a//x", 4, "is not a name below the served folder"],
      ["a\nx", 4, '"a\\nx"'],
    ];
    for (const [target, status, words] of bad) {
      for (const file of [small, large]) {
        const run = await it.put(file, "-t", target);
        expect({ target, status: run.status, errors: run.errors }).toEqual({
          target,
          status,
          errors: expect.stringContaining(words),
        });
        expect(run.errors.trim().split("\n").length).toBe(1);
      }
    }
    for (const [file, status, words] of [
      [join(it.folder, "none"), 7, "it is not there"],
      [join(small, "x"), 7, "a part of the path is a file"],
      [it.folder, 4, "a folder; use -r"],
    ] as const) {
      const run = await it.put(file);
      expect(run.status).toBe(status);
      expect(run.errors).toContain(words);
    }
    await expectOnly(it, "d", "file");
  });

  test("a large file for a folder's name is refused before it is sent", async () => {
    await using it = await setUp();
    mkdirSync(join(it.root, "d/f"), { recursive: true });
    const file = it.source("f", "");
    writeLargeFile(file, 64 << 20);
    using proxy = startCounter(it);
    const run = await runClient(proxy.address, ["put", file, "-t", "d/", "-d", it.logs]);
    expect(run.status).toBe(4);
    expect(run.errors).toContain('not a file: "d/f" is a folder');
    expect(proxy.sent()).toBeLessThan(32 << 20);
    await expectOnly(it, "d", "d/f");
  });

  test("over links in the root nothing goes out, and none is replaced", async () => {
    await using it = await setUp();
    const outside = it.source("outside/file", "outside");
    symlinkSync(join(it.folder, "outside"), join(it.root, "folder"));
    symlinkSync(outside, join(it.root, "link"));
    const [small, large] = [it.source("small", "x"), it.source("large", randomBytes(2_000_000))];
    for (const file of [small, large]) {
      for (const target of ["folder/x", "folder/file", "link"])
        expect((await it.put(file, "-t", target)).status).toBe(4);
    }
    const { address } = it.server;
    for (const args of [
      ["rm", "link"],
      ["rm", "-r", "folder"],
      ["rm", "folder/file"],
      ["mv", "link", "x"],
      ["mv", "-f", "small", "link"],
      ["mkdir", "-p", "folder/x"],
    ]) {
      await it.put(small);
      expect({ args, status: (await runClient(address, args)).status }).toEqual({ args, status: 4 });
    }
    expect(readlinkSync(join(it.root, "link"))).toBe(outside);
    expect(readdirSync(join(it.folder, "outside"))).toEqual(["file"]);
    expect(readFileSync(outside, "utf8")).toBe("outside");
  });
});

describe("put -", () => {
  test("a pipe: 50 MB, in little memory, with nothing to tell before its end", async () => {
    await using it = await setUp();
    const content = randomBytes(50_000_000);
    const child = spawnFedClient(it.server.address, ["put", "-", "-t", "f", "-d", it.logs]);
    const feeding = feed(child, content);
    await waitFor("some of it is held", () => heldBytes(it) > 0);
    expect(visible(it)).toEqual([]);
    await feeding;
    expect(await child.exited).toBe(0);
    expect(readFileSync(join(it.root, "f")).equals(content)).toBe(true);
    await expectOnly(it, "f");
  });

  test("an empty one, a file, --size that is right", async () => {
    await using it = await setUp();
    const { address } = it.server;
    expect((await runClient(address, ["put", "-", "-t", "empty"], { stdin: "" })).status).toBe(0);
    expect((await runClient(address, ["put", "-", "-t", "five", "--size", "5"], { stdin: "12345" })).status).toBe(0);
    expect(statSync(join(it.root, "empty")).size).toBe(0);
    expect(readFileSync(join(it.root, "five"), "utf8")).toBe("12345");
    await expectOnly(it, "empty", "five");
  });

  test.each([
    ["shorter", 999_999],
    ["longer", 1_000_001],
  ])("%s than --size says: nothing is put, and nothing is kept", async (_, size) => {
    await using it = await setUp();
    writeFileSync(join(it.root, "f"), "old");
    const args = ["put", "-", "-t", "f", "--size", "1000000"];
    const run = await runClient(it.server.address, args, { stdin: randomBytes(size) });
    expect(run.status).toBe(7);
    expect(run.errors).toContain(`standard input ended after ${size} bytes, not 1000000; nothing was put`);
    expect(readFileSync(join(it.root, "f"), "utf8")).toBe("old");
    await expectOnly(it, "f");
  });

  test("wrong uses of it: status 2, or 4 for a folder's name", async () => {
    await using it = await setUp();
    mkdirSync(join(it.root, "d"));
    const file = it.source("f", "x");
    for (const args of [["-"], ["-", "-t", "d/"], ["-", file, "-t", "x"], [file, "--size", "1"]])
      expect((await it.put(...args)).status).toBe(2);
    for (const target of ["d", "/"]) expect((await it.put("-", "-t", target)).status).toBeOneOf([2, 4]);
    await expectOnly(it, "d");
  });

  test.each(["SIGKILL", "SIGINT", "SIGTERM"] as const)("%s in the middle: nothing appears", async (signal) => {
    await using it = await setUp();
    const child = spawnFedClient(it.server.address, ["put", "-", "-t", "f", "-d", it.logs]);
    await feed(child, randomBytes(8_000_000), false);
    await waitFor("most of it is held", () => heldBytes(it) > 1_000_000);
    child.kill(signal);
    expect(await child.exited).toBe({ SIGKILL: 137, SIGINT: 130, SIGTERM: 143 }[signal]);
    await waitFor("the server has seen its end", () => it.puts().length === 1);
    expect(it.puts()[0]!.status).toBe("lost");
    expect(visible(it)).toEqual([]);
    expect(logNames(it)).toEqual([]);
  });

  test("the connection cut four times: it goes on in the same process", async () => {
    await using it = await setUp();
    const content = randomBytes(60_000_000);
    using proxy = startProxy({
      target: it.server.port,
      toServer: (bytes, at, connection) => (connection <= 4 && at > 11_000_000 ? undefined : bytes),
    });
    const run = await runClient(proxy.address, ["put", "-", "-t", "f", "-d", it.logs], { stdin: content });
    expect(run.status).toBe(0);
    // The first cut is of a connection from before, which may be closed at any time: not worth a word.
    expect(run.errors.match(/trying again/g)?.length).toBe(3);
    expect(readFileSync(join(it.root, "f")).equals(content)).toBe(true);
    await waitFor("all attempts are logged", () => it.puts().length === 5);
    const offsets = it.puts().map((line) => line.offset!);
    expect(offsets[0]).toBe(0);
    for (const [index, offset] of offsets.slice(1).entries()) expect(offset).toBeGreaterThan(offsets[index]!);
    await expectOnly(it, "f");
  });

  test("both workers killed in the middle, three times: likewise", async () => {
    await using it = await setUp();
    const content = randomBytes(4 * CUT);
    const child = spawnFedClient(it.server.address, ["put", "-", "-t", "f", "-d", it.logs]);
    for (let at = 0; at < 3 * CUT; at += CUT) {
      await feed(child, content.subarray(at, at + CUT), false);
      await waitFor("more is held", () => heldBytes(it) > at + ALMOST);
      await killWorkers(it.server);
    }
    await feed(child, content.subarray(3 * CUT));
    expect(await child.exited).toBe(0);
    expect(readFileSync(join(it.root, "f")).equals(content)).toBe(true);
    expect((await donePut(it)).offset).toBeGreaterThan(2 * CUT + ALMOST);
    await expectOnly(it, "f");
  });

  test("a stream that pauses for longer than every limit loses nothing", async () => {
    // Longer than the server takes to say WAIT, and than a busy machine stands still, so that only the pause is longer.
    await using it = await setUp({ args: ["--idle-timeout", "6"] });
    const args = ["put", "-", "-t", "f", "-d", it.logs, "--timeout", "7", "--retries", "1"];
    const child = spawnFedClient(it.server.address, args);
    await feed(child, randomBytes(1_000_000), false);
    // By whoever's time is over first.
    await waitFor("the connection was given up", () =>
      it.server.log.some(({ status }) => status === "lost" || status === "idle"),
    );
    await feed(child, randomBytes(1_000_000, 2));
    expect(await new Response(child.stderr).text()).toBe("");
    expect(await child.exited).toBe(0);
    expect((await donePut(it)).offset).toBeGreaterThan(0);
    expect(readFileSync(join(it.root, "f"))).toEqual(
      Buffer.concat([randomBytes(1_000_000), randomBytes(1_000_000, 2)]),
    );
    await expectOnly(it, "f");
  });
});

/** A proxy that counts what a client sends. */
function startCounter({ server }: Place) {
  let sent = 0;
  const toServer = (bytes: Uint8Array) => {
    sent += bytes.length;
    return bytes;
  };
  return Object.assign(startProxy({ target: server.port, toServer }), { sent: () => sent });
}

/** Writes into a client's standard input as fast as it is read. */
async function feed(child: ReturnType<typeof spawnFedClient>, content: Uint8Array, end = true): Promise<void> {
  for (let at = 0; at < content.length; at += 65_536) {
    child.stdin.write(content.subarray(at, at + 65_536));
    await child.stdin.flush();
  }
  if (end) await child.stdin.end();
}

const SIZE = 6 << 20;
/** So far the server's part of it goes when it is cut, give or take a frame. */
const CUT = SIZE / 2;
const ALMOST = CUT - MAX_CONTENT_BYTES - 1000;

/** Starts to put `file`, kills the client once the server holds `cut` bytes, and returns what is held and logged. */
async function putAndKill(it: Place, file: string, args: string[] = [], cut = CUT, env: ClientOptions["env"] = {}) {
  const before = it.puts().length;
  it.limit = cut;
  const child = spawnClient(it.address, ["put", file, "-d", it.logs, ...args], { env });
  await waitFor(`${cut} bytes are held`, () => heldBytes(it) >= cut - MAX_CONTENT_BYTES - 1000 && readLog(it));
  child.kill("SIGKILL");
  await child.exited;
  await waitFor("the server has seen its end", () => it.puts().length > before);
  it.limit = Number.POSITIVE_INFINITY;
  return { log: readLog(it)!, held: heldBytes(it) };
}

describe("resume", () => {
  test("kill -9 of the client at half: the log, and only the rest is sent", async () => {
    await using it = await setUp();
    const file = it.source("big", "");
    writeLargeFile(file, SIZE);
    const { log, held } = await putAndKill(it, file, ["-t", "x", "--limit-rate", "20M"]);
    expect(visible(it)).toEqual([]);
    expect(Object.keys(log).sort()).toEqual(
      ["command", "path", "server", "file", "id", "etag", "size", "mtime", "bytes", "crc32"].sort(),
    );
    const { address } = it;
    expect(log).toMatchObject({ command: "put", path: "x", server: address, file, size: SIZE, mtime: mtimeOf(file) });
    expect(log.id).toMatch(/^[0-9a-f]{32}$/);
    expect(log.bytes).toBeGreaterThanOrEqual(MAX_CONTENT_BYTES);
    expect(log.crc32).toBe(Bun.hash.crc32(readFileSync(file).subarray(0, log.bytes)));
    const run = await it.put(file, "-t", "x", "--json");
    expect(run.status).toBe(0);
    expect(JSON.parse(run.output)).toMatchObject({ path: "x", offset: held });
    await waitFor("it is logged", () => it.puts().length === 2);
    expect(it.puts()[1]).toMatchObject({ offset: held, bytes: SIZE - held, status: "ok" });
    expect(digestOf(join(it.root, "x"))).toBe(digestOf(file));
    await expectOnly(it, "x");
  });

  test("the log's bytes and crc32 are of one another at every moment of a resumed upload", async () => {
    await using it = await setUp();
    const file = it.source("big", "");
    writeLargeFile(file, SIZE);
    const { held } = await putAndKill(it, file);
    const child = spawnClient(it.address, ["put", file, "-d", it.logs, "--limit-rate", "300K"]);
    const seen = new Map<number, number>();
    await waitFor("it has gone on for a while", () => {
      const log = readLog(it);
      if (log) seen.set(log.bytes, log.crc32);
      return log && log.bytes > held && seen.size > 3;
    });
    child.kill("SIGKILL");
    const content = readFileSync(file);
    for (const [bytes, crc32] of seen)
      expect([bytes, crc32]).toEqual([bytes, Bun.hash.crc32(content.subarray(0, bytes))]);
  });

  test("`resume` does it, and leaves nothing", async () => {
    await using it = await setUp();
    const file = it.source("big", "");
    writeLargeFile(file, SIZE);
    const { held } = await putAndKill(it, file);
    const run = await runClient("127.0.0.1:1", ["resume", "-d", it.logs]);
    expect(run).toMatchObject({ status: 0, errors: expect.stringContaining("resuming") });
    expect(await donePut(it)).toMatchObject({ offset: held });
    expect(digestOf(join(it.root, "big"))).toBe(digestOf(file));
    await expectOnly(it, "big");
  });

  test.each(["SIGINT", "SIGTERM"] as const)("%s says how to go on", async (signal) => {
    await using it = await setUp();
    const file = it.source("big", "");
    writeLargeFile(file, SIZE);
    it.limit = CUT;
    const child = spawnClient(it.address, ["put", file, "-d", it.logs]);
    await waitFor("some is held", () => heldBytes(it) > ALMOST);
    child.kill(signal);
    expect(await child.exited).toBe(signal === "SIGINT" ? 130 : 143);
    expect(await new Response(child.stderr).text()).toContain("the same command goes on from here");
    it.limit = Number.POSITIVE_INFINITY;
    expect((await it.put(file)).status).toBe(0);
    expect((await donePut(it)).offset).toBeGreaterThan(ALMOST);
    expect(digestOf(join(it.root, "big"))).toBe(digestOf(file));
    await expectOnly(it, "big");
  });

  test.each(["SIGKILL", "SIGINT", "SIGTERM"] as const)("over a restart of the server after %s", async (signal) => {
    await using it = await setUp({ args: ["--grace", "0.1"] });
    const file = it.source("big", "");
    writeLargeFile(file, SIZE);
    it.limit = CUT;
    const child = spawnClient(it.address, ["put", file, "-d", it.logs, "--retries", "100"]);
    await waitFor("some is held", () => heldBytes(it) > ALMOST);
    const workers = it.server.workers();
    await it.server.stop(signal);
    await waitFor("the workers are gone", () => workers.every((pid) => !isAlive(pid)));
    const held = heldBytes(it);
    it.limit = Number.POSITIVE_INFINITY;
    await using again = await startServer(it.root, { args: ["--writable"], port: it.server.port });
    expect(await child.exited).toBe(0);
    expect(await new Response(child.stderr).text()).toContain("trying again");
    await waitFor("it is logged", () => again.log.some((line) => line.event === "put"));
    expect(again.log.filter((line) => line.event === "put")).toMatchObject([{ offset: held, bytes: SIZE - held }]);
    expect(digestOf(join(it.root, "big"))).toBe(digestOf(file));
    await expectOnly(it, "big");
  });

  test("the source changed in between: said, started again, the new content", async () => {
    await using it = await setUp();
    const file = it.source("big", "");
    writeLargeFile(file, SIZE);
    await putAndKill(it, file);
    writeFileSync(file, randomBytes(SIZE, 9));
    const run = await it.put(file);
    expect(run).toMatchObject({ status: 0, errors: expect.stringContaining('big" has changed; starting again') });
    expect((await donePut(it)).offset).toBe(0);
    expect(digestOf(join(it.root, "big"))).toBe(digestOf(file));
    expect(logNames(it)).toEqual([]);
    expect(visible(it)).toEqual(["big"]);
  });

  const damages: [string, (path: string) => void, number][] = [
    ["one byte in the first piece", (path) => damage(path, 100), 0],
    ["one byte in the second piece", (path) => damage(path, 17 << 20), SUM_BYTES],
    ["cut in the second piece", (path) => truncateSync(path, 17 << 20), 17 << 20],
    ["longer than what was sent", (path) => appendFileSync(path, randomBytes(20 << 20)), SUM_BYTES],
    ["not there any more", (path) => rmSync(path), 0],
    ["empty", (path) => truncateSync(path, 0), 0],
  ];
  test.each(damages)(
    "what the server holds is damaged, %s: on at the last piece that agrees",
    async (_, spoil, offset) => {
      await using it = await setUp();
      const file = it.source("big", "");
      writeLargeFile(file, 20 << 20);
      const { log } = await putAndKill(it, file, [], 19 << 20);
      spoil(join(it.root, ".reprise", `put-${log.id}`));
      expect(await it.put(file)).toMatchObject({ status: 0, errors: "" });
      expect((await donePut(it)).offset).toBe(offset);
      expect(digestOf(join(it.root, "big"))).toBe(digestOf(file));
      await expectOnly(it, "big");
    },
  );

  const logDamages: [string, (log: ResumeLog) => string, boolean][] = [
    ["not JSON", () => '{"command":"pu', true],
    ["empty", () => "", true],
    ["without an id", (log) => JSON.stringify({ ...log, id: undefined }), true],
    ["with an id of no use", (log) => JSON.stringify({ ...log, id: "../lock" }), true],
    ["of impossible numbers", (log) => JSON.stringify({ ...log, bytes: log.size + 1 }), true],
    ["of an id that the server does not know", (log) => JSON.stringify({ ...log, id: "0".repeat(32) }), false],
  ];
  test.each(logDamages)("a log %s: started again, and the content is right", async (_, spoil, isSaid) => {
    await using it = await setUp();
    const file = it.source("big", randomBytes(SIZE));
    const { log } = await putAndKill(it, file);
    writeFileSync(join(it.logs, logNames(it).find((name) => name.endsWith(".resume.json"))!), spoil(log));
    const run = await it.put(file);
    expect(run.status).toBe(0);
    if (isSaid) expect(run.errors).toContain("starting again");
    expect((await donePut(it)).offset).toBe(0);
    expect(digestOf(join(it.root, "big"))).toBe(digestOf(file));
    expect(logNames(it)).toEqual([]);
  });

  test("what is held goes away after the client has asked for it: started again", async () => {
    await using it = await setUp();
    const file = it.source("big", randomBytes(SIZE));
    const { log } = await putAndKill(it, file);
    const name = join(it.root, ".reprise", `put-${log.id}`);
    let asked = false;
    let isGone = false;
    using proxy = startProxy({
      target: it.server.port,
      toServer(bytes) {
        asked ||= bytes.includes(FrameType.SUMS) && Buffer.from(bytes).includes(log.id!);
        if (asked && !isGone && bytes[4] === FrameType.PUT) {
          isGone = true;
          rmSync(name);
        }
        return bytes;
      },
    });
    const run = await runClient(proxy.address, ["resume", "-d", it.logs, "--server", proxy.address]);
    expect(run.status).toBe(0);
    await donePut(it);
    expect(it.puts().map((line) => line.status)).toEqual(["lost", "bad_range", "ok"]);
    expect(digestOf(join(it.root, "big"))).toBe(digestOf(file));
    await expectOnly(it, "big");
  });

  test.each([
    ["--no-clobber", "4"],
    ["--if-etag", "4"],
  ])("%s holds for `resume` as well", async (option) => {
    await using it = await setUp();
    writeFileSync(join(it.root, "big"), "old");
    const { etag } = JSON.parse((await runClient(it.server.address, ["stat", "big", "--json"])).output);
    const file = it.source("big", randomBytes(SIZE));
    if (option === "--no-clobber") rmSync(join(it.root, "big"));
    await putAndKill(it, file, option === "--no-clobber" ? [option] : [option, etag]);
    writeFileSync(join(it.root, "big"), "another");
    const run = await runClient("127.0.0.1:1", ["resume", "-d", it.logs]);
    expect(run.status).toBe(option === "--no-clobber" ? 4 : 5);
    expect(readFileSync(join(it.root, "big"), "utf8")).toBe("another");
  });

  test("damage on the way is found, and the content is right", async () => {
    await using it = await setUp();
    const file = it.source("big", randomBytes(20_000_000));
    using proxy = startProxy({
      target: it.server.port,
      toServer(bytes, at, connection) {
        if (connection <= 3 && at <= 7_000_000 && at + bytes.length > 7_000_000) bytes[7_000_000 - at]! ^= 1;
        return bytes;
      },
    });
    const run = await runClient(proxy.address, ["put", file, "-d", it.logs]);
    expect(run.status).toBe(0);
    expect(run.errors).toContain("damaged on the way; trying again");
    expect(digestOf(join(it.root, "big"))).toBe(digestOf(file));
    await expectOnly(it, "big");
  });

  test("a second client with the same source: status 7, and it names the first", async () => {
    await using it = await setUp();
    const file = it.source("big", randomBytes(SIZE));
    it.limit = CUT;
    const first = spawnClient(it.address, ["put", file, "-d", it.logs]);
    await waitFor("the first has begun", () => heldBytes(it) > ALMOST);
    const second = await it.put(file, "--retries", "0");
    expect(second.status).toBe(7);
    expect(second.errors).toContain(`it is being sent by process ${first.pid}`);
    expect(first.exitCode).toBeNull();
    first.kill("SIGINT");
    expect(await first.exited).toBe(130);
    it.limit = Number.POSITIVE_INFINITY;
    expect((await it.put(file)).status).toBe(0);
    expect(digestOf(join(it.root, "big"))).toBe(digestOf(file));
    await expectOnly(it, "big");
  });

  test("the worker killed before the rename: what is there, of the same size and time, is not taken for it", async () => {
    const size = 3_000_000;
    await using it = await setUp();
    const file = it.source("l/f", randomBytes(size, 1));
    const there = join(it.root, "f");
    writeFileSync(there, randomBytes(size, 2));
    for (const path of [file, there]) utimesSync(path, 1_700_000_000, 1_700_000_000);
    const lock = openSync(join(it.root, ".reprise/lock"), "r+");
    expect(tryLock(lock, join(it.root, ".reprise/lock"))).toBe(true);
    const args = ["sync", "--up", "--checksum", "/", join(it.folder, "l"), "-d", it.logs];
    const child = spawnClient(it.server.address, args);
    const isWhole = (name: string) => sizeOf(staging(it, name)) === size;
    await waitFor("all of it has come", () => staged(it).some(isWhole));
    await killWorkers(it.server);
    closeSync(lock);
    expect(await child.exited).toBe(0);
    expect(digestOf(there)).toBe(digestOf(file));
    expect(visible(it)).toEqual(["f"]);
    expect(logNames(it)).toEqual([]);
  });

  test("a server that reads a little and cuts, again and again: --retries ends it with status 8", async () => {
    using folder = makeRoot({ big: randomBytes(3_000_000) });
    let connections = 0;
    let uploads = 0;
    const listener = Bun.listen<FrameDecoder>({
      hostname: "127.0.0.1",
      port: 0,
      socket: {
        open(socket) {
          socket.data = new FrameDecoder({ maxLength: MAX_CONTENT_BYTES });
          // Who goes on for ever is let go.
          if (++connections > 8) listener.stop(true);
          else socket.write(encodeWelcome("fake"));
        },
        data(socket, bytes) {
          socket.data.push(new Uint8Array(bytes));
          for (let frame = socket.data.next(); frame; frame = socket.data.next()) {
            if (frame.type === FrameType.STAT) socket.write(encodeError(new RepriseError("not_found")));
            if (frame.type === FrameType.SUMS) socket.write(encodeEnd(0));
            if (frame.type !== FrameType.DATA) continue;
            uploads++;
            return void socket.terminate();
          }
        },
      },
    });
    using _ = { [Symbol.dispose]: () => listener.stop(true) };
    const args = ["put", join(folder.path, "big"), "-t", "x", "-d", join(folder.path, "logs"), "--retries", "2"];
    const run = await runClient(`127.0.0.1:${listener.port}`, args);
    expect(run.status).toBe(8);
    expect(run.errors).toContain("given up after 2 retries");
    expect(run.errors.match(/trying again/g)?.length).toBe(2);
    // One more where the connection was one from before.
    expect(uploads).toBeOneOf([3, 4]);
  });
});

function damage(path: string, at: number): void {
  const fd = openSync(path, "r+");
  writeSync(fd, "damage", at);
  closeSync(fd);
}

describe("conditions", () => {
  const sizes = [
    ["small", 10_000],
    ["large", SIZE],
  ] as const;

  test.each(sizes)("--no-clobber (%s)", async (_, size) => {
    await using it = await setUp();
    const file = it.source("f", randomBytes(size));
    expect((await it.put(file, "--no-clobber")).status).toBe(0);
    writeFileSync(join(it.root, "f"), "theirs");
    for (const option of ["--no-clobber", "-n"]) {
      const run = await it.put(file, option);
      expect(run).toMatchObject({ status: 4, errors: expect.stringContaining('"f" exists already') });
    }
    expect(readFileSync(join(it.root, "f"), "utf8")).toBe("theirs");
    expect((await it.put(file)).status).toBe(0);
    expect(digestOf(join(it.root, "f"))).toBe(digestOf(file));
    await expectOnly(it, "f");
  });

  test.each(sizes)("--if-etag: that version, another, none (%s)", async (_, size) => {
    await using it = await setUp();
    const file = it.source("f", randomBytes(size));
    const { etag } = JSON.parse((await it.put(file, "--json")).output);
    writeFileSync(file, randomBytes(size, 2));
    const second = JSON.parse((await it.put(file, "--if-etag", etag, "--json")).output);
    expect(second.etag).not.toBe(etag);
    expect(digestOf(join(it.root, "f"))).toBe(digestOf(file));
    writeFileSync(file, randomBytes(size, 3));
    const wrong = await it.put(file, "--if-etag", etag);
    expect(wrong).toMatchObject({
      status: 5,
      errors: expect.stringContaining("is not the version that was to be replaced"),
    });
    expect(digestOf(join(it.root, "f"))).not.toBe(digestOf(file));
    expect((await it.put(file, "-t", "none", "--if-etag", etag)).status).toBe(5);
    expect((await it.put(file, file, "--if-etag", etag)).status).toBe(2);
    expect(visible(it)).toEqual(["f"]);
    expect(logNames(it)).toEqual([]);
  });

  const lost: [string, (it: Place, etag: string) => string[]][] = [
    ["without a condition", () => []],
    ["--no-clobber", () => ["-n", "-t", "new"]],
    ["--if-etag", (_, etag) => ["--if-etag", etag]],
  ];
  for (const [size, bytes] of sizes) {
    test.each(lost)(`the answer of a ${size} one is lost, %s: it is done, and not sent twice`, async (_, args) => {
      await using it = await setUp();
      writeFileSync(join(it.root, "f"), "old");
      const { etag } = JSON.parse((await runClient(it.server.address, ["stat", "f", "--json"])).output);
      const file = it.source("f", randomBytes(bytes));
      const there = join(it.root, args(it, etag).includes("new") ? "new" : "f");
      const isThere = () => statSync(there, { throwIfNoEntry: false })?.size === bytes;
      let cuts = 0;
      using proxy = startProxy({
        target: it.server.port,
        toClient: (answer) => (isThere() && cuts++ === 0 ? undefined : answer),
      });
      const run = await runClient(proxy.address, ["put", file, "-d", it.logs, ...args(it, etag)]);
      expect(run.status).toBe(0);
      expect(cuts).toBeGreaterThan(0);
      await it.server.stop("SIGINT");
      expect(it.puts().map((line) => line.status)).toEqual(["ok"]);
      expect(digestOf(there)).toBe(digestOf(file));
      expect(staged(it)).toEqual([]);
      expect(logNames(it)).toEqual([]);
    });
  }

  test("an old version of the same size and time does not pass for the new one when its answer is lost", async () => {
    await using it = await setUp();
    const [source, there] = [it.source("f", randomBytes(SIZE)), join(it.root, "f")];
    writeFileSync(there, randomBytes(SIZE, 2));
    for (const file of [source, there]) utimesSync(file, 1_700_000_000, 1_700_000_000);
    const { etag } = JSON.parse((await runClient(it.server.address, ["stat", "f", "--json"])).output);
    // All but the last frame comes over, the first time.
    using proxy = startProxy({
      target: it.server.port,
      toServer: (bytes, at, connection) => (connection === 1 && at + bytes.length > SIZE ? undefined : bytes),
    });
    const run = await runClient(proxy.address, ["put", source, "-d", it.logs, "--if-etag", etag]);
    expect(run.status).toBe(0);
    expect(digestOf(there)).toBe(digestOf(source));
    await expectOnly(it, "f");
  });

  test.each([
    [["rm", "f"], []],
    [["mv", "f", "g"], ["g"]],
    [
      ["mkdir", "d"],
      ["d", "f"],
    ],
  ])("the answer of %j is lost: it is done all the same", async (args, left) => {
    await using it = await setUp();
    writeFileSync(join(it.root, "f"), "x");
    let cuts = 0;
    using proxy = startProxy({
      target: it.server.port,
      toClient: (bytes) => (visible(it).sort().join() === left.join() && cuts++ === 0 ? undefined : bytes),
    });
    expect((await runClient(proxy.address, args)).status).toBe(0);
    expect(cuts).toBeGreaterThan(0);
    expect(visible(it).sort()).toEqual(left);
  });
});

test("without --writable: status 4 and how to open it, for every change, and nothing is made", async () => {
  using root = makeRoot({ f: "f", "d/x": "x" });
  using folder = temporaryFolder();
  await using server = await startServer(root.path);
  const file = join(folder.path, "g");
  writeFileSync(file, "g");
  const changes = [
    ["put", file],
    ["put", "-", "-t", "x"],
    ["rm", "f"],
    ["rm", "-r", "d"],
    ["mv", "f", "h"],
    ["mkdir", "e"],
  ];
  for (const args of [...changes, ["put", file, join(root.path, "f"), "-t", "d/"]]) {
    const run = await runClient(server.address, args);
    expect({ args, status: run.status }).toEqual({ args, status: 4 });
    for (const line of run.errors.trim().split("\n")) expect(line).toContain("--writable");
  }
  expect(readdirSync(root.path, { recursive: true }).sort()).toEqual(["d", "d/x", "f"]);
});

test("without --writable a large file is refused before it is sent", async () => {
  using root = makeRoot({});
  using folder = temporaryFolder();
  await using server = await startServer(root.path);
  const file = join(folder.path, "big");
  writeLargeFile(file, 64 << 20);
  using counter = startCounter({ server } as Place);
  const run = await runClient(counter.address, ["put", file, "-d", join(folder.path, "logs")]);
  expect(run).toMatchObject({ status: 4, errors: expect.stringContaining("--writable") });
  expect(counter.sent()).toBeLessThan(32 << 20);
  expect(readdirSync(folder.path)).toEqual(["big"]);
});

describe("a source that changes", () => {
  /** More than the kernel holds on its way: when some of it passes, the client has not read all. */
  const LONG = 32 << 20;

  /** Sends a file by way of a wire on which it is changed as its first bytes come by: nobody has to be quick for that. */
  function spawnChanged(it: Place, file: string, change: () => void) {
    let isChanged = false;
    const proxy = startProxy({
      target: it.server.port,
      toServer(bytes, at) {
        if (at > 1_000_000 && !isChanged) {
          isChanged = true;
          change();
        }
        return bytes;
      },
    });
    return Object.assign(proxy, { child: spawnClient(proxy.address, ["put", file, "-d", it.logs]) });
  }

  test.each([
    ["grows", (file: string) => appendFileSync(file, "more")],
    ["shrinks", (file: string) => truncateSync(file, LONG - 1000)],
    ["is written to at its start", (file: string) => damage(file, 10)],
    ["becomes small", (file: string) => truncateSync(file, 10)],
    ["becomes empty", (file: string) => truncateSync(file, 0)],
  ])("once while it is sent, and %s: started again, the new content", async (_, change) => {
    await using it = await setUp();
    const file = it.source("f", randomBytes(LONG));
    using sending = spawnChanged(it, file, () => change(file));
    const { child } = sending;
    expect(await child.exited).toBe(0);
    expect(await new Response(child.stderr).text()).toContain("changed while it was sent; starting again");
    expect(digestOf(join(it.root, "f"))).toBe(digestOf(file));
    await expectOnly(it, "f");
  });

  test("all the time: given up with status 7, and nothing is put", async () => {
    await using it = await setUp();
    const file = it.source("f", randomBytes(LONG));
    using proxy = startProxy({
      target: it.server.port,
      toServer(bytes) {
        damage(file, 10);
        return bytes;
      },
    });
    const child = spawnClient(proxy.address, ["put", file, "-d", it.logs, "--retries", "2"]);
    expect(await child.exited).toBe(7);
    expect(await new Response(child.stderr).text()).toContain("again and again; put it when it is at rest");
    expect(visible(it)).toEqual([]);
  });

  test.each([
    ["removed", 7, () => {}, "it is not there"],
    ["made a folder", 4, (file: string) => mkdirSync(file), "a folder"],
  ])("and is then %s: status %i and one line", async (_, status, replace, words) => {
    await using it = await setUp();
    const file = it.source("f", randomBytes(LONG));
    using sending = spawnChanged(it, file, () => {
      damage(file, 10);
      rmSync(file);
      replace(file);
    });
    const { child } = sending;
    expect(await child.exited).toBe(status);
    const errors = await new Response(child.stderr).text();
    expect(errors).toContain(words);
    expect(errors.trim().split("\n").length).toBe(2);
    expect(visible(it)).toEqual([]);
  });

  test("removed or replaced under its name in the middle: what it was, whole", async () => {
    await using it = await setUp();
    const file = it.source("f", randomBytes(LONG));
    const digest = digestOf(file);
    using sending = spawnChanged(it, file, () => rmSync(file));
    const { child } = sending;
    expect(await child.exited).toBe(0);
    expect(digestOf(join(it.root, "f"))).toBe(digest);
    await expectOnly(it, "f");
  });
});

const isRoot = process.getuid?.() === 0;
/** Takes from root what lets it read and write everything. */
const AS_ANYONE = isRoot ? ["setpriv", "--bounding-set", "-dac_override,-dac_read_search,-fowner"] : [];
const canDrop = !isRoot || Bun.which("setpriv") !== null;
if (!canDrop) console.log("skipped: the tests of permissions need setpriv, where root runs them");

/** Makes `path` somebody else's, with no right for us. */
function lockAway(path: string, mode: number): void {
  chmodSync(path, mode);
  if (isRoot) chownSync(path, 65_534, 65_534);
}

test.skipIf(!canDrop)("a source without permission: status 7, said", async () => {
  await using it = await setUp();
  const file = it.source("f", "x");
  lockAway(file, isRoot ? 0o600 : 0);
  const run = await runClient(it.server.address, ["put", file, "-d", it.logs], { runBy: AS_ANYONE });
  expect(run).toMatchObject({ status: 7, errors: expect.stringContaining("no permission") });
  await expectOnly(it);
});

test.skipIf(!canDrop)("a folder that the server may not write: refused, without its path", async () => {
  using root = makeRoot({ "d/f": "f" });
  lockAway(join(root.path, "d"), isRoot ? 0o755 : 0o555);
  await using it = await setUp({ root: root.path, runBy: AS_ANYONE });
  for (const size of [10, SIZE]) {
    const run = await it.put(it.source("g", randomBytes(size)), "-t", "d/");
    expect(run.status).toBe(4);
    expect(run.errors).toContain('the server may not write "d/g"');
    expect(run.errors).not.toContain(root.path);
  }
  for (const args of [
    ["rm", "d/f"],
    ["mv", "d/f", "x"],
    ["mkdir", "d/e"],
  ]) {
    const run = await runClient(it.server.address, args);
    expect(run).toMatchObject({ status: 4, errors: expect.stringContaining("the server may not write") });
  }
  expect(readdirSync(join(root.path, "d"))).toEqual(["f"]);
});

test.skipIf(!canDrop)("a root that cannot be written: --writable does not start, and says why", async () => {
  using root = makeRoot({ f: "f" });
  lockAway(root.path, isRoot ? 0o755 : 0o555);
  const options = { runBy: AS_ANYONE };
  await expect(startServer(root.path, { ...options, args: ["--writable"] })).rejects.toThrow(
    "cannot be written (EACCES); start without --writable to only serve it",
  );
  await using server = await startServer(root.path, options);
  expect((await runClient(server.address, ["cat", "f"])).output).toBe("f");
});

const canMount = isRoot && Bun.which("mount") !== null;
if (!canMount) console.log("skipped: the tests of a full or read-only disk mount a tmpfs, which needs root");

test.skipIf(!canMount)("a full disk on the server: status 9 in its words, and on when there is room", async () => {
  using small = mountSmall("4M");
  if (!small) return;
  await using it = await setUp({ root: small.path, args: ["--keep-free", "0"] });
  const file = it.source("f", randomBytes(SIZE));
  const full = await it.put(file);
  expect(full.status).toBe(9);
  expect(full.errors).toContain('no room on the server for "f"');
  expect(full.errors.trim().split("\n").length).toBe(1);
  expect(visible(it)).toEqual([]);
  const held = heldBytes(it);
  expect(held).toBeGreaterThan(3_000_000);
  const small2 = await it.put(it.source("g", randomBytes(500_000)));
  expect(small2.status).toBe(9);
  expect(visible(it)).toEqual([]);
  await waitFor("nothing is left of it", () => staged(it).length === 1);
  Bun.spawnSync(["mount", "-o", "remount,size=64M", small.path]);
  expect((await it.put(file)).status).toBe(0);
  expect((await donePut(it)).offset).toBe(held);
  expect(digestOf(join(it.root, "f"))).toBe(digestOf(file));
  await expectOnly(it, "f");
});

test.skipIf(!canMount)("a read-only root: --writable does not start; one that becomes so refuses", async () => {
  using small = mountSmall("4M");
  if (!small) return;
  await using it = await setUp({ root: small.path });
  const remount = (how: string) => Bun.spawnSync(["mount", "-o", `remount,${how}`, small.path]).exitCode;
  await it.server.stop("SIGINT");
  expect(remount("ro")).toBe(0);
  const started = startServer(small.path, { args: ["--writable"] });
  await expect(started).rejects.toThrow("cannot be written (EROFS); start without --writable to only serve it");
  await using server = await startServer(small.path);
  expect((await runClient(server.address, ["ls"])).status).toBe(0);
});

// ---------------------------------------------------------------------------------------------------- raw wire

const ID = "0123456789abcdef".repeat(2);

/** A connection that speaks the protocol as the test wants it. */
async function speak(
  port: number,
): Promise<RawConnection & { ask(...frames: Uint8Array[]): void; answers(): Answer[] }> {
  const connection = await connectRaw(port);
  const rest: Uint8Array[] = [];
  const writeRest = () => {
    while (rest[0]) {
      const taken = connection.socket.write(rest[0]);
      rest[0] = rest[0].subarray(Math.max(0, taken));
      if (rest[0].length > 0) return void setTimeout(writeRest, 1);
      rest.shift();
    }
  };
  const ask = (...frames: Uint8Array[]) => {
    rest.push(Buffer.concat(frames));
    if (rest.length === 1) writeRest();
  };
  ask(encodeHello());
  return Object.assign(connection, {
    ask,
    answers() {
      const decoder = new FrameDecoder({ maxLength: MAX_ANSWER_BYTES });
      decoder.push(connection.received());
      const answers: Answer[] = [];
      for (let frame = decoder.next(); frame; frame = decoder.next()) answers.push(decodeAnswer(frame));
      // WELCOME.
      return answers.slice(1);
    },
  });
}

const putFrame = (path: string, fields: Partial<Put> = {}) =>
  encodeRequest({
    action: "put",
    path,
    id: "",
    offset: 0,
    size: UNKNOWN_SIZE,
    mtime: 0,
    noClobber: false,
    parents: false,
    etag: "",
    ...fields,
  });
const data = (content: Uint8Array | string) => {
  const bytes = new Uint8Array(Buffer.from(content as string));
  return Buffer.concat([encodeDataHeader(bytes.length, Bun.hash.crc32(bytes)), bytes]);
};
/** PUT, one DATA, END. */
const wholePut = (path: string, content: string, fields: Partial<Put> = {}) =>
  Buffer.concat([putFrame(path, fields), ...(content ? [data(content)] : []), encodeEnd(content.length)]);
const request = (request: Request) => encodeRequest(request);
const get = (path: string) => request({ action: "get", path, offset: 0, length: UNKNOWN_SIZE, etag: "" });
const quit = request({ action: "quit" });

/** What a process has open, by name. */
function openFiles(pid: number): string[] {
  const folder = `/proc/${pid}/fd`;
  return readdirSync(folder).flatMap((fd) => {
    try {
      return readlinkSync(join(folder, fd));
    } catch {
      return [];
    }
  });
}

/** What was answered, in short: the code of an error, the size of a file, content, the paths of a list. */
function brief(answer: Answer): unknown {
  if (answer.type === "error") return answer.error.code;
  if (answer.type === "meta") return answer.size;
  if (answer.type === "data") return Buffer.from(answer.content).toString();
  if (answer.type === "entries") return answer.entries.map(({ path }) => path).sort();
  return answer.type;
}

/** Sends all in one go, then QUIT, and returns what was answered before its END. */
async function converse(it: Place, ...frames: Uint8Array[]): Promise<unknown[]> {
  using connection = await speak(it.server.port);
  connection.ask(...frames, quit);
  await waitFor("the server has closed", () => connection.closed());
  return connection.answers().map(brief).slice(0, -1);
}

describe("the wire", () => {
  const codes: [string, Uint8Array[], ErrorCode][] = [
    ["more content than announced", [putFrame("f", { size: 3 }), data("four"), encodeEnd(4)], "refused"],
    ["less than announced", [putFrame("f", { size: 5 }), data("four"), encodeEnd(4)], "refused"],
    ["an END that counts more", [putFrame("f"), data("four"), encodeEnd(5)], "refused"],
    ["an END that counts less", [putFrame("f"), data("four"), encodeEnd(3)], "refused"],
    ["given up", [putFrame("f"), data("four"), encodeEnd(Number.MAX_SAFE_INTEGER)], "refused"],
    ["an offset beyond what is held", [putFrame("f", { id: ID, offset: 5 }), data("four"), encodeEnd(4)], "bad_range"],
    ["an offset without an id", [putFrame("f", { offset: 5 }), data("four"), encodeEnd(4)], "bad_range"],
    ["an offset beyond the size", [putFrame("f", { id: ID, offset: 5, size: 4 }), encodeEnd(0)], "bad_range"],
    ["a bad id", [putFrame("f", { id: "../lock" }), data("four"), encodeEnd(4)], "refused"],
    ["a bad name", [putFrame("../f"), data("four"), encodeEnd(4)], "bad_name"],
    ["the root", [putFrame(""), data("four"), encodeEnd(4)], "refused"],
  ];
  test.each(codes)("%s: an answer, nothing is made or kept, and the connection goes on", async (_, frames, code) => {
    await using it = await setUp();
    expect(await converse(it, ...frames, wholePut("g", "next"), get("g"))).toEqual([code, 4, 4, "next", "end"]);
    await expectOnly(it, "g");
    await donePut(it);
    expect(it.puts().map((line) => line.status)).toEqual([code, "ok"]);
  });

  const violations: [string, Uint8Array[]][] = [
    ["DATA outside of a PUT", [data("four")]],
    ["END outside of a PUT", [encodeEnd(0)]],
    ["a request in the middle of a PUT", [putFrame("f"), data("four"), request({ action: "stat", path: "f" })]],
    ["a DATA of more than 512 KiB", [putFrame("f"), data(new Uint8Array(MAX_CONTENT_BYTES + 1))]],
    [
      "a large frame behind the END",
      [wholePut("g", "x"), encodeDataHeader(MAX_REQUEST_BYTES + 1, 0), new Uint8Array(MAX_REQUEST_BYTES + 1)],
    ],
    ["a large frame without a PUT", [encodeDataHeader(MAX_REQUEST_BYTES + 1, 0)]],
    ["a DATA without content", [putFrame("f"), Buffer.from("00000000842cf7b024", "hex")]],
  ];
  test.each(violations)("%s: the connection ends, others go on, and nothing half is made", async (_, frames) => {
    await using it = await setUp();
    using connection = await speak(it.server.port);
    connection.ask(...frames);
    await waitFor("the server has closed", () => connection.closed());
    expect(connection.answers().map(brief).at(-1)).toBe("bad_frame");
    // Nor what was whole, but not yet acknowledged.
    expect(visible(it)).toEqual([]);
    await waitFor("nothing is left of it", () => staged(it).length === 0);
    expect(await converse(it, wholePut("h", "x"))).toEqual([1]);
  });

  test("a DATA of 512 KiB behind a PUT, and damage in one", async () => {
    await using it = await setUp();
    const content = randomBytes(MAX_CONTENT_BYTES);
    expect(await converse(it, putFrame("f"), data(content), encodeEnd(content.length))).toEqual([content.length]);
    expect(readFileSync(join(it.root, "f")).equals(content)).toBe(true);
    const damaged = data(content);
    damaged[1000]! ^= 1;
    using connection = await speak(it.server.port);
    connection.ask(putFrame("g"), damaged);
    await waitFor("the server has closed", () => connection.closed());
    expect(connection.answers().map(brief)).toEqual(["checksum"]);
    await expectOnly(it, "f");
  });

  test("a connection that ends anywhere in an upload leaves nothing visible", async () => {
    await using it = await setUp();
    const whole = wholePut("f", "content", { id: ID });
    for (const cut of [1, 9, putFrame("f", { id: ID }).length, whole.length - 18, whole.length - 1]) {
      using connection = await speak(it.server.port);
      connection.ask(whole.subarray(0, cut));
      await waitFor("it has come", () => connection.received().length > 0);
      connection.socket.end();
      await waitFor("the server has closed", () => connection.closed());
      expect(visible(it)).toEqual([]);
    }
  });

  test("the same id over a second connection: in_use while the first is alive, and not afterwards", async () => {
    await using it = await setUp();
    using first = await speak(it.server.port);
    first.ask(putFrame("f", { id: ID }), data("four"));
    await waitFor("it is held", () => heldBytes(it) === 4);
    expect(await converse(it, wholePut("f", "other", { id: ID }))).toEqual(["in_use"]);
    expect(heldBytes(it)).toBe(4);
    first.ask(encodeEnd(4));
    await waitFor("it is answered", () => first.answers().length === 1);
    expect(readFileSync(join(it.root, "f"), "utf8")).toBe("four");
    expect(await converse(it, wholePut("f", "other", { id: ID }))).toEqual([5]);
    await expectOnly(it, "f");
  });

  test("a peer that owes content is not told to wait, and --idle-timeout ends it", async () => {
    // Several times what the server waits before it says WAIT.
    await using it = await setUp({ args: ["--idle-timeout", "3.5"] });
    using connection = await speak(it.server.port);
    connection.ask(putFrame("f"), data("four"));
    await waitFor("the server has closed", () => connection.closed());
    // One may go out in the second in which the content came.
    expect(connection.answers().filter(({ type }) => type === "wait").length).toBeLessThanOrEqual(1);
    await waitFor("it is logged", () => it.puts().length === 1);
    expect(visible(it)).toEqual([]);
  });

  test("changes and questions in one packet: in order, and each sees the ones before it", async () => {
    await using it = await setUp();
    const list = request({ action: "list", path: "", recursive: true });
    const answers = await converse(
      it,
      wholePut("a", "one"),
      get("a"),
      wholePut("a", "second"),
      wholePut("b", "", { noClobber: true }),
      wholePut("b", "no", { noClobber: true }),
      get("a"),
      request({ action: "mkdir", path: "d", parents: false }),
      request({ action: "move", path: "a", to: "d/a", overwrite: false }),
      get("a"),
      list,
      request({ action: "remove", path: "d", recursive: false }),
      request({ action: "remove", path: "d", recursive: true }),
      request({ action: "sums", id: "", path: "b" }),
      list,
    );
    const first = [3, 3, "one", "end", 6, 0, "exists", 6, "second", "end"];
    const second = ["end", "end", "not_found", ["b", "d", "d/a"], "end", "refused", "end", "end", ["b"], "end"];
    expect(answers).toEqual([...first, ...second]);
  });

  test("content in the frame of the PUT, and the folders above it made", async () => {
    await using it = await setUp();
    const put = (path: string, fields: Partial<Put>) =>
      putFrame(path, { size: 2, content: Buffer.from("hi"), ...fields });
    const frames = [put("f", {}), put("d/e/g", {}), put("d/e/g", { parents: true }), put("f/g", { parents: true })];
    const refused = [
      put("../g", { parents: true }),
      put(".reprise/x/g", { parents: true }),
      put("f", { noClobber: true }),
    ];
    const codes = ["not_found", 2, "not_a_folder", "bad_name", "refused", "exists"];
    expect(await converse(it, ...frames, ...refused, get("d/e/g"))).toEqual([2, ...codes, 2, "hi", "end"]);
    await expectOnly(it, "d", "d/e", "d/e/g", "f");
  });

  test("600 small ones without waiting: all answered, in order, all there", async () => {
    await using it = await setUp();
    const names = Array.from({ length: 600 }, (_, index) => `f${index}`);
    const frames = names.map((name) => wholePut(name, name));
    expect(await converse(it, ...frames)).toEqual(names.map((name) => name.length));
    for (const name of names) expect(readFileSync(join(it.root, name), "utf8")).toBe(name);
    await expectOnly(it, ...names);
  });

  test("300 with their content, then the end of the stream: the first of them are stored, and nothing is left open", async () => {
    await using it = await setUp();
    const names = Array.from({ length: 300 }, (_, index) => `f${index}`);
    using connection = await speak(it.server.port);
    const content = Buffer.from("hello");
    connection.ask(...names.map((name) => putFrame(name, { size: content.length, content })));
    // Its own direction only: a closed socket that gets answers would take back what it sent.
    connection.socket.shutdown();
    await waitFor("the server has closed", () => connection.closed());
    const kept = [it.root, join(it.root, ".reprise"), join(it.root, ".reprise/lock")];
    const open = () => it.server.workers().flatMap(openFiles);
    const left = () => open().filter((path) => path.startsWith(it.root) && !kept.includes(path));
    const there = () => readdirSync(it.root).filter((name) => name !== ".reprise");
    // Who has gone is answered no more: what of it is not begun by then is not done behind its back.
    await waitFor("what is stored is logged, and closed", () => {
      const count = there().length;
      return count > 0 && it.puts().length === count && left().length === 0;
    });
    const stored = names.slice(0, there().length);
    for (const name of stored) expect(readFileSync(join(it.root, name), "utf8")).toBe("hello");
    await expectOnly(it, ...stored);
  });

  test("a group that cannot be made at all: each has its own answer, and so has all that comes behind it", async () => {
    // Without flock the lock is a link: a folder of that name fails at once.
    await using it = await setUp({ env: WITHOUT_FFI });
    const inTheWay = join(it.root, ".reprise/lock.lock");
    mkdirSync(inTheWay);
    using connection = await speak(it.server.port);
    connection.ask(wholePut("a", "1"), wholePut("b", "22"), putFrame("c", { size: 3 }));
    await waitFor("the group is answered", () => connection.answers().length === 2);
    rmSync(inTheWay, { recursive: true });
    connection.ask(data("333"), encodeEnd(3), wholePut("d", "4444"), get("c"), quit);
    await waitFor("the server has closed", () => connection.closed());
    const answers = connection.answers().map(brief);
    expect(answers).toEqual(["failed", "failed", 3, 4, 3, "333", "end", "end"]);
    await expectOnly(it, "c", "d");
  });

  test("a PUT that is refused at its start is passed over, and what comes behind it is done", async () => {
    await using it = await setUp();
    mkdirSync(join(it.root, "d"));
    const content = randomBytes(MAX_CONTENT_BYTES);
    const frames = [putFrame("d"), ...Array.from({ length: 20 }, () => data(content)), encodeEnd(20 * content.length)];
    expect(await converse(it, ...frames, wholePut("f", "x"))).toEqual(["not_a_file", 1]);
    await expectOnly(it, "d", "f");
  });
});

// ---------------------------------------------------------------------------------------------------- rm, mv, mkdir

describe("rm, mv, mkdir", () => {
  /** Each command with its status, and a word of what is said. */
  const script: [string[], number, string][] = [
    [["rm", "none"], 3, 'not found: "none"'],
    [["rm", "d"], 4, "rm -r removes it with all that is in it"],
    [["rm", "f"], 0, ""],
    [["rm", "f"], 3, 'not found: "f"'],
    [["rm", "/"], 4, "the served folder itself"],
    [["rm", "-r", "/"], 4, "the served folder itself"],
    [["rm", ".reprise/lock"], 4, "keeps to itself"],
    [["rm", "g", "none", "h"], 3, 'not found: "none"'],
    [["mv", "a", "b"], 4, '"b"'],
    [["mv", "a", "a2"], 0, ""],
    [["mv", "a2", "d"], 0, ""],
    [["mv", "b", "c", "d/"], 0, ""],
    [["mv", "x", "y", "none/"], 3, "none"],
    [["mv", "x", "y", "z"], 4, 'not a folder: "z"'],
    [["mv", "x", "y"], 4, '"y"'],
    [["mv", "-f", "x", "y"], 0, ""],
    [["mv", "z", "z"], 4, '"z"'],
    [["mv", "d", "d"], 4, "no such name or move"],
    [["mv", "d", "d/x"], 4, "no such name or move"],
    [["mv", "-f", "full", "d/"], 0, ""],
    [["mv", "none", "z"], 3, 'not found: "none"'],
    [["mv", "z"], 2, "where to"],
    [["mkdir", "d"], 4, '"d" exists already'],
    [["mkdir", "-p", "d"], 0, ""],
    [["mkdir", "n/e/w"], 3, "mkdir -p makes it"],
    [["mkdir", "-p", "n/e/w"], 0, ""],
    [["mkdir", "z"], 4, '"z" exists already'],
    [["mkdir", "-p", "z/y"], 4, "not a folder"],
    [["mkdir", "a".repeat(256)], 4, "255 bytes"],
    [["rm", "-r", "n"], 0, ""],
  ];
  test("as in a shell, but nothing is lost unasked", async () => {
    await using it = await setUp();
    for (const name of ["f", "g", "h", "a", "b", "c", "x", "y", "z"]) writeFileSync(join(it.root, name), name);
    for (const name of ["d", "full"]) mkdirSync(join(it.root, name));
    writeFileSync(join(it.root, "full/i"), "i");
    for (const [args, status, words] of script) {
      const run = await runClient(it.server.address, args);
      expect({ args, status: run.status, errors: run.errors }).toEqual({
        args,
        status,
        errors: words === "" ? "" : expect.stringContaining(words),
      });
    }
    await expectOnly(it, "d", "d/a2", "d/b", "d/c", "d/full", "d/full/i", "y", "z");
    expect(readFileSync(join(it.root, "y"), "utf8")).toBe("x");
    expect(readFileSync(join(it.root, "z"), "utf8")).toBe("z");
  });

  test("--json: one object for each", async () => {
    await using it = await setUp();
    writeFileSync(join(it.root, "f"), "f");
    const outputs: unknown[] = [];
    for (const args of [
      ["mkdir", "d"],
      ["mv", "f", "d"],
      ["rm", "d/f"],
    ])
      outputs.push(JSON.parse((await runClient(it.server.address, [...args, "--json"])).output));
    expect(outputs).toEqual([
      { action: "mkdir", path: "d" },
      { action: "move", path: "f", to: "d/f" },
      { action: "delete", path: "d/f" },
    ]);
  });
});

// ---------------------------------------------------------------------------------------------------- promises

test("a reader of a file that is replaced 1,000 times sees one version or another, whole", async () => {
  // In memory, where there is some: with a sync for each the readers would only see it at rest.
  using memory = temporaryFolder(existsSync("/dev/shm") ? "/dev/shm" : undefined);
  await using it = await setUp({ root: memory.path });
  const writer = remoteOf(it);
  const readers = Array.from({ length: 3 }, () => remoteOf(it));
  const contentOf = (version: number) => new Uint8Array(200_000 + version * 37).fill(version % 251);
  await writer.upload({ path: "f", id: "", noClobber: false, parents: false, etag: "" }, memorySource(contentOf(0)));
  let isWriting = true;
  const reads = readers.map(() => 0);
  const reading = readers.map(async (reader, index) => {
    for (; isWriting; reads[index]!++) {
      const target = memoryTarget();
      await reader.download("f", target);
      const content = target.content();
      const version = (content.length - 200_000) / 37;
      expect([version, content.equals(contentOf(version))]).toEqual([version, true]);
    }
  });
  // A reader that gets less of the processor than the writer is waited for.
  for (let version = 1; version <= 1000 || Math.min(...reads) <= 10; version++)
    await writer.upload(
      { path: "f", id: "", noClobber: false, parents: false, etag: "" },
      memorySource(contentOf(version)),
    );
  isWriting = false;
  await Promise.all(reading);
  for (const remote of [writer, ...readers]) remote.close();
  await expectOnly(it, "f");
});

function remoteOf({ server }: Place): Remote {
  return new Remote({ servers: [{ host: "127.0.0.1", port: server.port }], retries: 3 });
}

function memorySource(content: Uint8Array): Source {
  return {
    name: "memory",
    size: content.length,
    mtime: 1,
    async read(offset, into) {
      const piece = content.subarray(offset, offset + into.length);
      into.set(piece);
      return piece.length;
    },
    sum: async (offset, length) => Bun.hash.crc32(content.subarray(offset, offset + length)),
    verify() {},
    renew() {},
    close() {},
  };
}

function memoryTarget(): Target & { content(): Buffer } {
  const chunks: Uint8Array[] = [];
  const target = {
    etag: "",
    bytes: 0,
    end: undefined,
    restartable: true,
    begin(meta: Meta) {
      target.etag = meta.etag;
    },
    async append(chunk: Uint8Array, _: number, free: (chunk: Uint8Array) => void) {
      chunks.push(new Uint8Array(chunk));
      target.bytes += chunk.length;
      free(chunk);
    },
    settle: async () => {},
    reset() {
      chunks.length = 0;
      target.bytes = 0;
      target.etag = "";
    },
    content: () => Buffer.concat(chunks),
  };
  return target;
}

test("100 uploads with kill -9 of the client, a worker or the server at random points: whole versions, and all arrive", async () => {
  const seed = Number(process.env.SEED ?? 20_261_122);
  const LANES = 10;
  const ROUNDS = 10;
  await using it = await setUp({ args: ["--limit-rate", "16M"] });
  let server = it.server;
  let restarting: Promise<void> | undefined;
  const restart = async () => {
    const workers = server.workers();
    server.process.kill("SIGKILL");
    await waitFor("the workers are gone", () => workers.every((pid) => !isAlive(pid)));
    await server.process.exited;
    server = await startServer(it.root, { args: ["--writable", "--limit-rate", "16M"], port: it.server.port });
  };
  const kill = {
    client: (child: ReturnType<typeof spawnClient>) => child.kill("SIGKILL"),
    worker: () => {
      const [pid] = server.workers();
      if (pid) killHard(pid);
    },
    server: () => {
      restarting ??= restart().finally(() => {
        restarting = undefined;
      });
      return restarting;
    },
  };
  const versionOf = (path: string) => Bun.hash.xxHash64(readFileSync(path));
  const runLane = async (lane: number) => {
    const random = seeded(seed + lane);
    const file = it.source(`f${lane}`, "");
    const there = join(it.root, `f${lane}`);
    const versions = new Set<bigint>();
    const check = () => {
      if (existsSync(there)) expect(versions).toContain(versionOf(there));
    };
    const logs = join(it.folder, `logs${lane}`);
    const loggedBytes = () => {
      const [name] = existsSync(logs) ? readdirSync(logs).filter((name) => name.endsWith(LOG_SUFFIX)) : [];
      try {
        return name ? (JSON.parse(readFileSync(join(logs, name), "utf8")) as ResumeLog).bytes : -1;
      } catch {
        // It has just gone.
        return -1;
      }
    };
    for (let round = 0; round < ROUNDS; round++) {
      const content = randomBytes(
        random(4) === 0 ? random(MAX_CONTENT_BYTES) : 600_000 + random(1_500_000),
        seed + lane + 10 * round,
      );
      writeFileSync(file, content);
      versions.add(versionOf(file));
      const args = ["put", file, "-d", logs, "--retries", "2"];
      const child = spawnClient(it.server.address, args);
      let ended = false;
      child.exited.then(() => {
        ended = true;
      });
      const bytes = random(content.length);
      if (random(2) === 0) await waitFor("so much is sent", () => ended || loggedBytes() >= bytes);
      else await Bun.sleep(random(150));
      const who = random(12) === 0 ? "server" : random(2) === 0 ? "client" : "worker";
      await kill[who](child);
      check();
      for (let status = await child.exited, tries = 0; status !== 0; tries++) {
        expect(status).toBeOneOf(who === "client" && tries === 0 ? [137, 8, 9] : [8, 9]);
        expect(tries).toBeLessThan(50);
        await restarting;
        // With all its patience: on a busy machine, workers that are killed again and again take long to come back.
        ({ status } = await runClient(it.server.address, args.slice(0, 4)));
      }
      expect(digestOf(there)).toBe(digestOf(file));
    }
    expect(existsSync(logs) ? readdirSync(logs) : []).toEqual([]);
  };
  try {
    await Promise.all(Array.from({ length: LANES }, (_, lane) => runLane(lane)));
    await restarting;
    expect(visible(it).sort()).toEqual(Array.from({ length: LANES }, (_, lane) => `f${lane}`));
    await kill.server();
    await waitFor("what dead workers left is swept", () => staged(it).length === 0);
  } finally {
    await server[Symbol.asyncDispose]();
  }
});

// ---------------------------------------------------------------------------------------------------- without FFI

describe("without FFI on either side", () => {
  test("put, resume, conditions, rm, mv", async () => {
    await using it = await setUp({ env: WITHOUT_FFI });
    const file = it.source("f", randomBytes(SIZE));
    const { held } = await putAndKill(it, file, [], CUT, WITHOUT_FFI);
    const run = await it.put(file);
    expect(run).toMatchObject({ status: 0, errors: "" });
    expect(await donePut(it)).toMatchObject({ offset: held, bytes: SIZE - held });
    expect(digestOf(join(it.root, "f"))).toBe(digestOf(file));
    expect(mtimeOf(join(it.root, "f"))).toBe(mtimeOf(file));
    writeFileSync(file, "other");
    expect((await it.put(file, "-n")).status).toBe(4);
    expect((await it.put(file, "-n", "-t", "new")).status).toBe(0);
    expect((await it.put(file, "--if-etag", "x")).status).toBe(5);
    for (const [args, status] of [
      [["mv", "new", "f"], 4],
      [["mv", "new", "g"], 0],
      [["rm", "g"], 0],
    ] as const)
      expect((await runClient(it.server.address, [...args], { env: WITHOUT_FFI })).status).toBe(status);
    await expectOnly(it, "f");
  });

  test("a worker killed in the middle: the lock that it left holds up nobody", async () => {
    await using it = await setUp({ env: WITHOUT_FFI });
    const child = spawnFedClient(it.server.address, ["put", "-", "-t", "f", "-d", it.logs], WITHOUT_FFI);
    await feed(child, randomBytes(CUT), false);
    await waitFor("some is held", () => heldBytes(it) > ALMOST);
    await killWorkers(it.server);
    await feed(child, randomBytes(CUT, 2));
    expect(await child.exited).toBe(0);
    expect(readFileSync(join(it.root, "f"))).toEqual(Buffer.concat([randomBytes(CUT), randomBytes(CUT, 2)]));
    await expectOnly(it, "f");
  });
});
