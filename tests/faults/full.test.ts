/**
 * Resources that run out: the disk, its inodes, the size that a file may have, the descriptors of a process. Each time it
 * is said, nothing half has a final name, and with more of it the same command ends well. See also put, resume and tree
 * .test.ts for a full tmpfs.
 */
import { expect, setDefaultTimeout, test } from "bun:test";
import { existsSync, mkdirSync, readdirSync, readFileSync, rmSync, writeFileSync } from "node:fs";
import { join } from "node:path";
import { decodeAnswer, encodeHello, encodeRequest, FrameDecoder, MAX_ANSWER_BYTES } from "../../protocol.ts";
import {
  connectRaw,
  type Files,
  makeRoot,
  randomBytes,
  runClient,
  sha256,
  startServer,
  TEST_MS,
  temporaryFolder,
  treeOf,
  waitFor,
} from "../fixtures.ts";
import { mountDisk, whyNoDisk } from "./ext4.ts";

setDefaultTimeout(TEST_MS);

const KIB = 1024;
/** All of the small disk may be used. */
const WRITABLE = ["--writable", "--keep-free", "0"];
const BIG = randomBytes(3_000 * KIB);
/** In the blocks of the shell that runs it, 512 or 1024 bytes each: less than BIG in either. */
const FILE_LIMIT = "ulimit -f 1000";
const noDisk = await whyNoDisk();
if (noDisk) console.log(`skipped: the tests of a full disk: ${noDisk}`);

/** A command that runs another within a limit. */
function within(limit: string): string[] {
  return ["sh", "-c", `${limit}; exec "$0" "$@"`];
}

function lines(text: string): string[] {
  return text.trim().split("\n");
}

function manyFiles(count: number, length = 100): Files {
  return Object.fromEntries(
    Array.from({ length: count }, (_, index) => [`t/${index}`, randomBytes(length, index + 1)]),
  );
}

test("a file that may not become so large on the client: status 7, and goes on without the limit", async () => {
  using root = makeRoot({ big: BIG });
  using local = temporaryFolder();
  await using server = await startServer(root.path);
  const args = ["get", "big", "-d", local.path];
  const run = await runClient(server.address, args, { runBy: within(FILE_LIMIT) });
  expect(run.status).toBe(7);
  expect(lines(run.errors)).toEqual([
    expect.stringContaining("larger than the system allows; what has arrived is kept"),
  ]);
  expect(readdirSync(local.path).sort()).toEqual(["big.part", "big.resume.json"]);
  expect(await runClient(server.address, args)).toMatchObject({ status: 0 });
  await waitFor("it is logged where it went on", () =>
    server.log.some(({ event, status, offset }) => event === "get" && status === "ok" && offset! > 0),
  );
  expect(await sha256(join(local.path, "big"))).toBe(await sha256(join(root.path, "big")));
});

test("a redirection that may not become so large: status 7, and it is not said that anything is kept", async () => {
  using root = makeRoot({ big: BIG });
  using local = temporaryFolder();
  await using server = await startServer(root.path);
  const runBy = ["sh", "-c", `${FILE_LIMIT}; exec "$0" "$@" > '${local.path}/out'`];
  const run = await runClient(server.address, ["cat", "big"], { runBy });
  expect(run.status).toBe(7);
  expect(run.errors).toContain('cannot write "standard output"');
  expect(run.errors).not.toContain("kept");
});

test("a file that may not become so large on the server: status 9, and goes on without the limit", async () => {
  using root = makeRoot({ big: "old" });
  using local = makeRoot({ big: BIG });
  const put = (address: string) => runClient(address, ["put", "big"], { cwd: local.path });
  {
    await using server = await startServer(root.path, { args: ["--writable"], runBy: within(FILE_LIMIT) });
    const run = await put(server.address);
    expect(run.status).toBe(9);
    expect(lines(run.errors)).toEqual([expect.stringContaining('"big" is larger than the server')]);
    expect(readFileSync(join(root.path, "big"), "utf8")).toBe("old");
    // It serves others all the same.
    writeFileSync(join(local.path, "small"), "small");
    expect(await runClient(server.address, ["put", "small"], { cwd: local.path })).toMatchObject({ status: 0 });
  }
  await using server = await startServer(root.path, { args: ["--writable"] });
  expect(await put(server.address)).toMatchObject({ status: 0 });
  expect(await sha256(join(root.path, "big"))).toBe(await sha256(join(local.path, "big")));
});

test("too many files open on the client: each that failed is said, and nothing is half", async () => {
  using root = makeRoot(manyFiles(300, 2 * KIB));
  using local = temporaryFolder();
  await using server = await startServer(root.path);
  const args = ["get", "-r", "t", "-d", local.path, "--retries", "1"];
  // From too few for anything to nearly enough.
  for (const count of [12, 16, 20, 28, 40]) {
    const run = await runClient(server.address, args, { runBy: within(`ulimit -n ${count}`) });
    const there = existsSync(join(local.path, "t")) ? treeOf(join(local.path, "t")) : [];
    const right = treeOf(join(root.path, "t"));
    if (run.status !== 0) expect(run.errors).not.toBe("");
    else expect(there).toEqual(right);
    expect(there.filter((line) => !right.includes(line) && !/\.(part|resume\.json)\b/.test(line))).toEqual([]);
  }
  expect(await runClient(server.address, args)).toMatchObject({ status: 0 });
  expect(treeOf(join(local.path, "t"))).toEqual(treeOf(join(root.path, "t")));
});

test("too many files open on the server: each upload is made or refused, and it serves on", async () => {
  using root = temporaryFolder();
  using local = makeRoot({ big: BIG });
  const options = { args: ["--writable", "--workers", "1"], runBy: within("ulimit -n 64") };
  await using server = await startServer(root.path, options);
  // Together they want more descriptors than there are: what comes in one piece is one group.
  const count = 200;
  const answers = await putTogether(server.port, count);
  const placed = readdirSync(root.path).filter((name) => name !== ".reprise");
  expect(placed.sort()).toEqual(answers.flatMap((type, index) => (type === "meta" ? [`${index}`] : [])).sort());
  expect(answers.filter((type) => type === "error").length).toBeGreaterThan(0);
  for (const name of placed) expect(readFileSync(join(root.path, name), "utf8")).toBe(`content ${name}`);

  const idle = await Promise.all(Array.from({ length: 80 }, () => connectRaw(server.port)));
  for (const connection of idle) connection[Symbol.dispose]();
  expect(await runClient(server.address, ["put", "big"], { cwd: local.path })).toMatchObject({ status: 0 });
  expect(await sha256(join(root.path, "big"))).toBe(await sha256(join(local.path, "big")));
  // What failed has closed what it had open.
  const worker = server.workers()[0]!;
  await waitFor("descriptors are closed", () => readdirSync(`/proc/${worker}/fd`).length < 24);
});

/** What is answered to so many small uploads that are sent at once, each under its number. */
async function putTogether(port: number, count: number): Promise<string[]> {
  using connection = await connectRaw(port);
  const frames = Array.from({ length: count }, (_, index) => {
    const content = Buffer.from(`content ${index}`);
    const fields = { id: "", offset: 0, mtime: 0, noClobber: false, etag: "", parents: false };
    return encodeRequest({ action: "put", path: `${index}`, size: content.length, content, ...fields });
  });
  const bytes = Buffer.concat([encodeHello(), ...frames]);
  expect(connection.socket.write(bytes)).toBe(bytes.length);
  return await waitFor("all are answered", () => {
    const decoder = new FrameDecoder({ maxLength: MAX_ANSWER_BYTES });
    decoder.push(connection.received());
    const answers: string[] = [];
    for (let frame = decoder.next(); frame; frame = decoder.next()) answers.push(decodeAnswer(frame).type);
    const outcomes = answers.filter((type) => type === "meta" || type === "error");
    return outcomes.length === count ? outcomes : undefined;
  });
}

test.skipIf(noDisk !== undefined)(
  "a full disk on the server: status 9, nothing half, and on when there is room",
  async () => {
    await using disk = await mountDisk("8M");
    using local = makeRoot({ big: BIG, ...manyFiles(40, 100 * KIB) });
    await using server = await startServer(disk.path, { args: WRITABLE });
    const put = (...args: string[]) => runClient(server.address, ["put", ...args], { cwd: local.path });
    const filler = join(disk.path, "filler");
    writeFileSync(filler, new Uint8Array(4_500 * KIB));
    const run = await put("big");
    expect(run).toMatchObject({ status: 9, errors: expect.stringContaining('no room on the server for "big"') });
    const folder = await put("-r", "t");
    expect(folder).toMatchObject({ status: 9, errors: expect.stringContaining("no room on the server") });
    const wanted = treeOf(join(local.path, "t"));
    expect(treeOf(join(disk.path, "t")).filter((line) => !wanted.includes(line))).toEqual([]);
    expect(existsSync(join(disk.path, "big"))).toBe(false);
    rmSync(filler);
    await runClient(server.address, ["rm", "-r", "t"]);
    expect(await put("big")).toMatchObject({ status: 0, errors: "" });
    expect(await sha256(join(disk.path, "big"))).toBe(await sha256(join(local.path, "big")));
  },
);

test.skipIf(noDisk !== undefined)(
  "no inode is left on the server: status 9 for each file, and on when there are some",
  async () => {
    await using disk = await mountDisk("8M", "-N", "32");
    using local = makeRoot(manyFiles(60));
    mkdirSync(join(disk.path, "t"));
    await using server = await startServer(disk.path, { args: WRITABLE });
    const put = () => runClient(server.address, ["put", "-r", "t"], { cwd: local.path });
    const run = await put();
    expect(run.status).toBe(9);
    const wanted = treeOf(join(local.path, "t"));
    const placed = treeOf(join(disk.path, "t"));
    expect(placed.filter((line) => !wanted.includes(line))).toEqual([]);
    expect(lines(run.errors).length).toBe(wanted.length - placed.length);
    for (const line of lines(run.errors)) expect(line).toContain("no room on the server");
    for (const name of readdirSync(join(local.path, "t")).slice(10)) rmSync(join(local.path, "t", name));
    await runClient(server.address, ["rm", "-r", "t"]);
    await waitFor("what was removed is gone", () => readdirSync(join(disk.path, ".reprise")).length === 1);
    expect(await put()).toMatchObject({ status: 0, errors: "" });
    expect(treeOf(join(disk.path, "t"))).toEqual(treeOf(join(local.path, "t")));
  },
);

test.skipIf(noDisk !== undefined)(
  "a full disk where an upload keeps its log: status 7 and why, and on when there is room",
  async () => {
    await using disk = await mountDisk("8M");
    using root = temporaryFolder();
    using local = makeRoot({ big: BIG });
    await using server = await startServer(root.path, { args: ["--writable"] });
    const logs = join(disk.path, "logs");
    mkdirSync(logs);
    const fillers = fill(disk.path);
    const put = () => runClient(server.address, ["put", "big", "-d", logs], { cwd: local.path });
    const run = await put();
    expect(run.status).toBe(7);
    expect(run.errors).toContain("disk is full");
    expect(existsSync(join(root.path, "big"))).toBe(false);
    for (const filler of fillers) rmSync(filler);
    expect(await put()).toMatchObject({ status: 0, errors: "" });
    expect(await sha256(join(root.path, "big"))).toBe(await sha256(join(local.path, "big")));
    expect(readdirSync(logs)).toEqual([]);
  },
);

/** Writes until not a byte more goes in; the names of what was written. */
function fill(folder: string): string[] {
  const names: string[] = [];
  for (let length = 1024 * KIB; length >= 1; length = Math.floor(length / 2)) {
    for (;;) {
      const name = join(folder, `filler-${names.length}`);
      names.push(name);
      try {
        writeFileSync(name, new Uint8Array(length));
      } catch {
        break;
      }
    }
  }
  return names;
}
