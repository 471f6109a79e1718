/** Interruptions of every kind: the file arrives whole, one version of it, and nothing is sent twice. */
import { describe, expect, setDefaultTimeout, test } from "bun:test";
import {
  appendFileSync,
  closeSync,
  existsSync,
  openSync,
  readdirSync,
  readFileSync,
  renameSync,
  rmSync,
  truncateSync,
  writeFileSync,
  writeSync,
} from "node:fs";
import { join } from "node:path";
import { PartFile, type ResumeLog } from "../resume.ts";
import { startProxy } from "./faults/proxy.ts";
import {
  killWorkers,
  loggedIn,
  makeRoot,
  randomBytes,
  readResumeLog,
  runClient,
  type Server,
  spawnClient,
  startServer,
  TEST_MS,
  temporaryFolder,
  waitFor,
  writeLargeFile,
} from "./fixtures.ts";

setDefaultTimeout(TEST_MS);

const SIZE = 32 << 20;

interface Place extends AsyncDisposable {
  root: string;
  source: string;
  server: Server;
  folder: string;
  part: string;
  file: string;
  log: string;
  digest: string;
}

/**
 * A server with one file, `big`, and a folder to fetch it into: so slow that a download is not over before it is killed,
 * however long the test's own process stands still. See `hurry`.
 */
async function setUp(args: string[] = ["--limit-rate", "3M"]): Promise<Place> {
  const root = makeRoot({});
  const folder = temporaryFolder();
  const source = join(root.path, "big");
  const digest = writeLargeFile(source, SIZE);
  const server = await startServer(root.path, { args });
  const file = join(folder.path, "big");
  const it: Place = {
    root: root.path,
    source,
    server,
    folder: folder.path,
    file,
    part: `${file}.part`,
    log: `${file}.resume.json`,
    digest,
    async [Symbol.asyncDispose]() {
      await it.server[Symbol.asyncDispose]();
      root[Symbol.dispose]();
      folder[Symbol.dispose]();
    },
  };
  return it;
}

const digestOf = (path: string) => new Bun.CryptoHasher("sha256").update(readFileSync(path)).digest("hex");
const readLog = (it: Place) => readResumeLog(it.log)!;
const loggedBytes = (it: Place) => loggedIn(it.log);
const gets = (server: Server) => server.log.filter((line) => line.event === "get");

/** The line of the download that was done; it may come later than the client's end. */
const doneGet = (server: Server) =>
  waitFor("the get is logged", () => gets(server).find(({ status }) => status === "ok"));

/** Another server on its root and port, which nothing holds up. */
async function hurry(it: Place): Promise<void> {
  const { port } = it.server;
  await it.server.stop("SIGINT");
  it.server = await startServer(it.root, { port });
}

/** A wire on which something is done as the first bytes come by, of which the kernel holds less than the whole file. */
function startTrap(it: Place, spring: () => void) {
  let isSprung = false;
  return startProxy({
    target: it.server.port,
    toClient(bytes, at) {
      if (at > 4 << 20 && !isSprung) {
        isSprung = true;
        spring();
      }
      return bytes;
    },
  });
}

async function get(it: Place, ...args: string[]) {
  return runClient(it.server.address, ["get", "big", "-d", it.folder, ...args]);
}

/** Starts a download, kills it once its log counts that many bytes, and returns what the log then says. */
async function getAndKill(it: Place, bytes: number, signal: NodeJS.Signals = "SIGKILL") {
  const child = spawnClient(it.server.address, ["get", "big", "-d", it.folder]);
  await waitFor(`${bytes} bytes are logged`, () => loggedBytes(it) >= bytes);
  child.kill(signal);
  const errors = await new Response(child.stderr).text();
  return { status: await child.exited, errors, log: readLog(it) };
}

/** Whole, of this digest, and alone. */
function expectWhole(it: Place, digest = it.digest): void {
  expect(digestOf(it.file)).toBe(digest);
  expect(readdirSync(it.folder)).toEqual(["big"]);
}

describe("kill -9", () => {
  test("of the client, 50 times at random points: each start goes on at the byte that the log names", async () => {
    await using it = await setUp(["--limit-rate", "1M"]);
    const offsets = [0];
    for (let round = 1; round <= 50; round++) {
      const { log } = await getAndKill(it, loggedBytes(it) + 1 + Math.floor(Math.random() * 200_000));
      expect(log).toMatchObject({ command: "get", path: "big", server: it.server.address, size: SIZE });
      await waitFor("the server has logged it", () => gets(it.server).length === round);
      offsets.push(log.bytes);
    }
    expect(gets(it.server).map((line) => line.offset)).toEqual(offsets.slice(0, 50));
    await it.server.stop("SIGINT");
    await using fast = await startServer(it.root);
    expect((await get({ ...it, server: fast })).status).toBe(0);
    await waitFor("the last is logged", () => gets(fast).length === 1);
    expect(gets(fast)[0]).toMatchObject({ offset: offsets[50]!, bytes: SIZE - offsets[50]! });
    expectWhole(it);
  });

  test("of the client: the server sends no byte before the logged offset again", async () => {
    await using it = await setUp();
    const offsets = [0];
    for (const bytes of [1 << 20, 3 << 20, 5 << 20]) offsets.push((await getAndKill(it, bytes)).log.bytes);
    expect((await get(it)).status).toBe(0);
    await waitFor("four requests are logged", () => gets(it.server).length === 4);
    expect(gets(it.server).map((line) => line.offset)).toEqual(offsets);
    expect(gets(it.server).at(-1)!.bytes).toBe(SIZE - offsets.at(-1)!);
    expectWhole(it);
  });

  test("of both workers in mid-download, 25 times: the client goes on by itself", async () => {
    await using it = await setUp(["--limit-rate", "500K"]);
    const child = spawnClient(it.server.address, ["get", "big", "-d", it.folder]);
    for (let killed = 0, bytes = 0; killed < 25; killed++) {
      const before = bytes;
      bytes = await waitFor("bytes have come", () => [loggedBytes(it)].find((now) => now > before));
      await killWorkers(it.server);
    }
    await hurry(it);
    expect(await child.exited).toBe(0);
    expect((await new Response(child.stderr).text()).match(/trying again/g)!.length).toBeGreaterThanOrEqual(25);
    expectWhole(it);
  });

  test("of the whole server: retries, then status 8, and `resume` goes on when it is back", async () => {
    await using it = await setUp();
    const { port } = it.server;
    const child = spawnClient(it.server.address, ["get", "big", "-d", it.folder, "--retries", "2"]);
    await waitFor("bytes have come", () => loggedBytes(it) > 1 << 20);
    await it.server.stop("SIGKILL");
    expect(await child.exited).toBe(8);
    expect(await new Response(child.stderr).text()).toContain("given up after 2 retries");
    const { bytes } = readLog(it);
    await using again = await startServer(it.root, { port });
    const run = await runClient("127.0.0.1:1", ["resume", "-d", it.folder]);
    expect(run.errors).toContain("resuming");
    expect(run.status).toBe(0);
    await doneGet(again);
    expect(gets(again).map((line) => line.offset)).toEqual([bytes]);
    expectWhole(it);
  });
});

describe("signals to the client", () => {
  test.each([
    ["SIGINT", 130],
    ["SIGTERM", 143],
  ] as const)("%s keeps part and log, status %d", async (signal, status) => {
    await using it = await setUp();
    const run = await getAndKill(it, 3 << 20, signal);
    expect(run.status).toBe(status);
    expect(run.errors).toContain("the same command goes on from here");
    expect(existsSync(it.part)).toBe(true);
    await hurry(it);
    expect((await get(it)).status).toBe(0);
    expect((await doneGet(it.server)).offset).toBe(run.log.bytes);
    expectWhole(it);
  });
});

describe("the file changed on the server", () => {
  const replacement = randomBytes(SIZE, 77);
  const newDigest = new Bun.CryptoHasher("sha256").update(replacement).digest("hex");

  test("between two runs: said, started again, the new version", async () => {
    await using it = await setUp();
    await getAndKill(it, 3 << 20);
    await hurry(it);
    writeFileSync(it.source, replacement);
    const run = await get(it);
    expect(run.status).toBe(0);
    expect(run.errors).toContain('changed on the server: "big"; starting again');
    expectWhole(it, newDigest);
  });

  const ways: [string, (source: string) => void, string][] = [
    ["overwritten in place", (source) => writeFileSync(source, replacement), newDigest],
    [
      "one byte of it, already sent",
      (source) => {
        const fd = openSync(source, "r+");
        writeSync(fd, "X", 100);
        closeSync(fd);
      },
      "",
    ],
    ["made shorter", (source) => truncateSync(source, 9 << 20), ""],
    ["made longer", (source) => appendFileSync(source, "more"), ""],
  ];
  test.each(ways)("in mid-file, %s: never a mixture", async (_, change, digest) => {
    await using it = await setUp([]);
    using trap = startTrap(it, () => change(it.source));
    const run = await runClient(trap.address, ["get", "big", "-d", it.folder]);
    expect(run).toMatchObject({ status: 0, errors: expect.stringContaining("starting again") });
    expectWhole(it, digest || digestOf(it.source));
  });

  test("replaced by a rename in mid-file: the old version, whole", async () => {
    await using it = await setUp([]);
    using trap = startTrap(it, () => {
      writeFileSync(`${it.source}.new`, replacement);
      renameSync(`${it.source}.new`, it.source);
    });
    expect((await runClient(trap.address, ["get", "big", "-d", it.folder])).status).toBe(0);
    expectWhole(it);
  });

  test("in mid-file to stdout: status 5, and not a byte of the other version", async () => {
    await using it = await setUp();
    const child = spawnClient(it.server.address, ["cat", "big"]);
    const old = readFileSync(it.source);
    const reader = child.stdout.getReader();
    const parts = [(await reader.read()).value!];
    writeFileSync(it.source, replacement);
    for (let part = await reader.read(); !part.done; part = await reader.read()) parts.push(part.value);
    const got = Buffer.concat(parts);
    expect(got.equals(old.subarray(0, got.length))).toBe(true);
    expect(await child.exited).toBe(5);
    expect(await new Response(child.stderr).text()).toContain("were given out; get it again");
  });

  test("again and again: given up with status 5", async () => {
    await using it = await setUp([]);
    using proxy = startProxy({
      target: it.server.port,
      toClient(bytes, at) {
        if (at > 1 << 20) appendFileSync(it.source, "x");
        return bytes;
      },
    });
    const run = await runClient(proxy.address, ["get", "big", "-d", it.folder, "--retries", "2"]);
    expect(run).toMatchObject({
      status: 5,
      errors: expect.stringContaining("again and again; get it when it is at rest"),
    });
  });

  test("renamed in mid-file on the server, so that there is none to start again with: the part stays", async () => {
    await using it = await setUp();
    const child = spawnClient(it.server.address, ["get", "big", "-d", it.folder]);
    await waitFor("bytes have come", () => loggedBytes(it) > 1 << 20);
    renameSync(it.source, `${it.source}-away`);
    expect(await child.exited).toBe(3);
    expect(loggedBytes(it)).toBeGreaterThan(1 << 20);
    renameSync(`${it.source}-away`, it.source);
    expect((await get(it)).status).toBe(0);
    expectWhole(it);
  });

  test("removed between two runs: not found, and the part stays", async () => {
    await using it = await setUp();
    const { log } = await getAndKill(it, 3 << 20);
    renameSync(it.source, `${it.source}-away`);
    expect((await get(it)).status).toBe(3);
    expect(readLog(it).bytes).toBe(log.bytes);
  });
});

describe("part and log", () => {
  const damages: [string, (it: Place) => void, string][] = [
    [
      "a log that is not JSON",
      (it) => writeFileSync(it.log, '{"command":"ge'),
      'the resume log "big.resume.json" is damaged',
    ],
    ["an empty log", (it) => writeFileSync(it.log, ""), "is damaged"],
    [
      "a log of impossible numbers",
      (it) => writeFileSync(it.log, JSON.stringify({ ...readLog(it), bytes: SIZE + 1 })),
      "is damaged",
    ],
    [
      "a log of another file",
      (it) => writeFileSync(it.log, JSON.stringify({ ...readLog(it), path: "other" })),
      'a part of another file, "other"',
    ],
    ["no log", (it) => renameSync(it.log, join(it.folder, "..", `${Date.now()}.gone`)), "has no resume log"],
    ["a part shorter than its log says", (it) => truncateSync(it.part, 1000), "is shorter than its resume log says"],
    [
      "a part with a wrong byte",
      (it) => {
        const fd = openSync(it.part, "r+");
        writeSync(fd, "X", 1_000_000);
        closeSync(fd);
      },
      "was damaged since it was written",
    ],
  ];
  test.each(damages)("%s: said, the part kept aside, the file right", async (_, damage, text) => {
    await using it = await setUp();
    await getAndKill(it, 3 << 20);
    await hurry(it);
    damage(it);
    const part = readFileSync(it.part);
    const run = await get(it);
    expect(run.status).toBe(0);
    expect(run.errors).toContain(text);
    expect(run.errors).toContain("the old part is kept as");
    expect(readFileSync(join(it.folder, "big.aside-1.part")).equals(part)).toBe(true);
    expect(digestOf(it.file)).toBe(it.digest);
    expect(readdirSync(it.folder).sort()).toEqual(["big", "big.aside-1.part"]);
  });

  test("a part longer than its log says: what the log does not count is fetched again, nothing else", async () => {
    await using it = await setUp();
    const { log } = await getAndKill(it, 3 << 20);
    await hurry(it);
    appendFileSync(it.part, "rubbish");
    expect(await get(it)).toMatchObject({ status: 0, errors: "" });
    expect((await doneGet(it.server)).offset).toBe(log.bytes);
    expectWhole(it);
  });

  test("one destination, two clients: the second says which process holds it, and the first goes on", async () => {
    await using it = await setUp();
    const first = spawnClient(it.server.address, ["get", "big", "-d", it.folder]);
    await waitFor("the first has begun", () => loggedBytes(it) > 0);
    // It holds it for as long as it is there, and is there until the second has ended.
    first.kill("SIGSTOP");
    const second = await get(it);
    first.kill("SIGCONT");
    expect(second.status).toBe(7);
    expect(second.errors).toContain(`is being written by process ${first.pid}`);
    expect(await first.exited).toBe(0);
    expectWhole(it);
  });

  test("the same without flock, by a file beside the part that goes with the download", async () => {
    await using it = await setUp();
    const env = { REPRISE_FFI: "0" };
    const first = spawnClient(it.server.address, ["get", "big", "-d", it.folder], { env });
    await waitFor("the first has begun", () => loggedBytes(it) > 0);
    first.kill("SIGSTOP");
    const second = await runClient(it.server.address, ["get", "big", "-d", it.folder], { env });
    expect(second.status).toBe(7);
    expect(second.errors).toContain(`is being written by process ${first.pid}`);
    first.kill("SIGKILL");
    await first.exited;
    await hurry(it);
    const third = await runClient(it.server.address, ["get", "big", "-d", it.folder], { env });
    expect(third).toMatchObject({ status: 0, errors: "" });
    expectWhole(it);
  });

  test("a part that was taken away or replaced under a download is not given its name", async () => {
    await using it = await setUp([]);
    using trap = startTrap(it, () => {
      renameSync(it.part, `${it.part}-away`);
      writeFileSync(it.part, "evil");
    });
    const run = await runClient(trap.address, ["get", "big", "-d", it.folder]);
    expect(run).toMatchObject({
      status: 7,
      errors: expect.stringContaining("something else took the name of its part"),
    });
    expect(existsSync(it.file)).toBe(false);
  });

  test("a log left behind by a download that had finished is removed", async () => {
    await using it = await setUp();
    const { log } = await getAndKill(it, 1 << 20);
    await hurry(it);
    expect((await get(it)).status).toBe(0);
    writeFileSync(it.log, JSON.stringify({ ...log, bytes: log.size }));
    const run = await runClient(it.server.address, ["resume", "-d", it.folder]);
    expect(run.status).toBe(0);
    expect(run.errors).toContain("is complete already");
    expectWhole(it);
  });

  test("no command at all resumes first, below subfolders too", async () => {
    await using it = await setUp();
    Bun.spawnSync(["mkdir", "-p", join(it.folder, "client_root/deep")]);
    const nested = { ...it, file: join(it.folder, "client_root/deep/big") };
    nested.part = `${nested.file}.part`;
    nested.log = `${nested.file}.resume.json`;
    nested.folder = join(it.folder, "client_root/deep");
    const { log } = await getAndKill(nested, 1 << 20);
    await hurry(it);
    const run = await runClient(it.server.address, [], { cwd: it.folder, stdin: "" });
    expect(run.status).toBe(0);
    expect(run.errors).toContain(`resuming client_root/deep/big from ${it.server.address} at`);
    expect((await doneGet(it.server)).offset).toBe(log.bytes);
    expectWhole(nested);
  });
});

const canMount = process.getuid?.() === 0 && Bun.which("mount") !== null;
if (!canMount) console.log("skipped: the disk-full test mounts a tmpfs, which needs root");
test.skipIf(!canMount)(
  "a write that failed is not followed by another in its place, though there is room again",
  async () => {
    using small = temporaryFolder();
    const mounted = Bun.spawnSync(["mount", "-t", "tmpfs", "-o", "size=3M", "none", small.path]);
    if (mounted.exitCode !== 0) return console.log("skipped: this machine does not let root mount a tmpfs");
    try {
      const filler = join(small.path, "filler");
      writeFileSync(filler, new Uint8Array(1 << 20));
      const file = await PartFile.open(join(small.path, "big"), "big", "server", () => {});
      const part = file.segments[0]!;
      part.begin({ kind: "file", size: 4 << 20, mtime: 0, etag: "e" });
      const failed = Promise.withResolvers<void>();
      await part.append(new Uint8Array(2_500_000), 0, () => failed.resolve()).catch(() => {});
      await failed.promise;
      rmSync(filler);
      await expect(part.append(new Uint8Array(1000), 0, () => {})).rejects.toThrow("the disk is full");
      await expect(part.settle()).rejects.toThrow("the disk is full");
      expect(part.bytes).toBe(0);
      file.close();
    } finally {
      Bun.spawnSync(["umount", small.path]);
    }
  },
);

test.skipIf(!canMount)("a full disk: status 7, and goes on when there is room", async () => {
  await using it = await setUp([]);
  using small = temporaryFolder();
  const mounted = Bun.spawnSync(["mount", "-t", "tmpfs", "-o", "size=8M", "none", small.path]);
  if (mounted.exitCode !== 0) return console.log("skipped: this machine does not let root mount a tmpfs");
  try {
    const args = ["get", "big", "-d", small.path];
    const full = await runClient(it.server.address, args);
    expect(full.status).toBe(7);
    expect(full.errors).toContain("the disk is full; what has arrived is kept");
    const log = JSON.parse(readFileSync(join(small.path, "big.resume.json"), "utf8")) as ResumeLog;
    expect(log.bytes).toBeGreaterThan(1 << 20);
    Bun.spawnSync(["mount", "-o", "remount,size=64M", small.path]);
    expect((await runClient(it.server.address, args)).status).toBe(0);
    expect((await doneGet(it.server)).offset).toBe(log.bytes);
    expect(digestOf(join(small.path, "big"))).toBe(it.digest);
  } finally {
    Bun.spawnSync(["umount", small.path]);
  }
});
