/** What a server takes and gives at the most: the size of an upload, the space that is left, the length of a list. */
import { describe, expect, setDefaultTimeout, test } from "bun:test";
import { existsSync, mkdirSync, readdirSync, readFileSync, statfsSync, writeFileSync } from "node:fs";
import { join } from "node:path";
import { type FolderUpload, openChanges } from "../changes.ts";
import {
  type Answer,
  decodeAnswer,
  encodeDataHeader,
  encodeEnd,
  encodeHello,
  encodeRequest,
  FrameDecoder,
  MAX_ANSWER_BYTES,
  MAX_CONTENT_BYTES,
  MAX_WHOLE_BYTES,
  type Put,
  UNKNOWN_SIZE,
} from "../protocol.ts";
import {
  connectRaw,
  HOME,
  makeRoot,
  mountSmall,
  randomBytes,
  runClient,
  sizeOf,
  startServer,
  TEST_MS,
  temporaryFolder,
  waitFor,
  writeTree,
} from "./fixtures.ts";

setDefaultTimeout(TEST_MS);

const MIB = 1024 * 1024;
const ID = "0123456789abcdef".repeat(2);
const canMount = process.getuid?.() === 0 && Bun.which("mount") !== null;
if (!canMount) console.log("skipped: the tests of --keep-free mount a tmpfs, which needs root");

const put = (fields: Partial<Put> = {}): Put => ({
  action: "put",
  path: "f",
  id: ID,
  offset: 0,
  size: UNKNOWN_SIZE,
  mtime: 0,
  noClobber: false,
  parents: false,
  etag: "",
  ...fields,
});

const writable = (...args: string[]) => ({ args: ["--writable", ...args] });
const staged = (root: string) => readdirSync(join(root, ".reprise")).filter((name) => name !== "lock");
const heldBytes = (root: string) => sizeOf(join(root, ".reprise", `put-${ID}`));
const freeBytes = (path: string) => {
  const { bavail, bsize } = statfsSync(path);
  return bavail * bsize;
};
const lines = (text: string) => text.split("\n").filter(Boolean);

/** A connection that speaks the protocol as the test wants it. */
async function speak(port: number) {
  const raw = await connectRaw(port);
  const send = (...frames: Uint8Array[]) => {
    let rest = Buffer.concat(frames);
    return waitFor("all is sent", () => {
      rest = rest.subarray(Math.max(0, raw.socket.write(rest)));
      return rest.length === 0;
    });
  };
  /** Without WELCOME, and without what only says that it takes its time. */
  const answers = (): Answer[] => {
    const decoder = new FrameDecoder({ maxLength: MAX_ANSWER_BYTES });
    decoder.push(new Uint8Array(raw.received()));
    const found: Answer[] = [];
    for (let frame = decoder.next(); frame; frame = decoder.next()) found.push(decodeAnswer(frame));
    return found.slice(1).filter(({ type }) => type !== "wait");
  };
  await send(encodeHello());
  return {
    send,
    answers,
    ask: (request: Put) => send(encodeRequest(request)),
    data: (bytes: Uint8Array) => send(encodeDataHeader(bytes.length, Bun.hash.crc32(bytes)), bytes),
    answer: (index = 0) => waitFor("an answer", () => answers()[index]),
    error: async (index = 0) => {
      const answer = await waitFor("an answer", () => answers()[index]);
      return answer.type === "error" ? { code: answer.error.code, text: answer.error.message } : answer;
    },
    [Symbol.dispose]: raw[Symbol.dispose],
  };
}

// ---------------------------------------------------------------------------------------------------- --max-upload

describe("--max-upload", () => {
  // In the frame of the PUT; in one DATA frame; in several, with an id.
  const LIMITS = [20_000, MAX_WHOLE_BYTES + 5, MAX_CONTENT_BYTES + 5];
  const CASES = LIMITS.flatMap((limit) => [-1, 0, 1].map((more) => [limit, more] as const));

  test.each(CASES)("of %d: a file of %d bytes more", async (limit, more) => {
    using root = makeRoot({});
    using folder = makeRoot({ f: randomBytes(limit + more) });
    await using server = await startServer(root.path, writable("--max-upload", String(limit)));
    const run = await runClient(server.address, ["put", "f"], { cwd: folder.path });
    if (more <= 0) {
      expect(run).toMatchObject({ status: 0, errors: "" });
      expect(readFileSync(join(root.path, "f"))).toEqual(readFileSync(join(folder.path, "f")));
    } else {
      expect(run.status).toBe(4);
      expect(run.errors).toBe(
        `error: refused: "f" is larger than the ${limit} bytes that the server takes (--max-upload)\n`,
      );
      expect(existsSync(join(root.path, "f"))).toBe(false);
    }
    await waitFor("nothing is left of it", () => staged(root.path).length === 0);
    expect(existsSync(join(folder.path, "client_root"))).toBe(false);
  });

  test("a known size is refused before any content, and the connection goes on", async () => {
    using root = makeRoot({});
    await using server = await startServer(root.path, writable("--max-upload", "1M"));
    using it = await speak(server.port);
    await it.ask(put({ size: MIB + 1 }));
    expect(await it.error()).toMatchObject({
      code: "too_large",
      text: 'refused: "f" is larger than the 1M that the server takes (--max-upload)',
    });
    await it.send(encodeEnd(0), encodeRequest(put({ id: "", size: 2, content: Buffer.from("ok") })));
    expect(await it.answer(1)).toMatchObject({ type: "meta", size: 2 });
  });

  test("an unknown size is refused at the first byte beyond, and what came before is dropped", async () => {
    using root = makeRoot({});
    await using server = await startServer(root.path, writable("--max-upload", "1M"));
    using it = await speak(server.port);
    await it.ask(put());
    await it.data(randomBytes(MAX_CONTENT_BYTES));
    await it.data(randomBytes(MAX_CONTENT_BYTES));
    await waitFor("all up to the limit is held", () => heldBytes(root.path) === MIB);
    expect(it.answers()).toEqual([]);
    await it.data(new Uint8Array(1));
    expect(await it.error()).toMatchObject({ code: "too_large" });
    await waitFor("it is dropped", () => staged(root.path).length === 0);
    await it.send(encodeEnd(0), encodeRequest({ action: "stat", path: "f" }));
    expect(await it.error(1)).toMatchObject({ code: "not_found" });
  });

  test.each([
    { name: "of known size", size: 2 * MIB, offset: 1000 },
    { name: "of unknown size", size: UNKNOWN_SIZE, offset: 2 * MIB },
  ])("what was held $name, from when more was allowed, is dropped", async ({ size, offset }) => {
    using root = makeRoot({});
    await using server = await startServer(root.path, writable("--max-upload", "1M"));
    const held = join(root.path, ".reprise", `put-${ID}`);
    writeFileSync(held, randomBytes(offset));
    using it = await speak(server.port);
    await it.ask(put({ size, offset }));
    expect(await it.error()).toMatchObject({ code: "too_large" });
    await waitFor("it is dropped", () => !existsSync(held));
  });

  test("put - ends with status 4 and one line", async () => {
    using root = makeRoot({});
    await using server = await startServer(root.path, writable("--max-upload", "1M"));
    const run = await runClient(server.address, ["put", "-", "-t", "f"], { stdin: randomBytes(3 * MIB) });
    expect(run.status).toBe(4);
    expect(lines(run.errors)).toEqual([
      'error: refused: "f" is larger than the 1M that the server takes (--max-upload)',
    ]);
    await waitFor("it is dropped", () => staged(root.path).length === 0);
    expect(existsSync(join(root.path, "f"))).toBe(false);
  });

  test("counts for a guest whose token is for a folder", async () => {
    using root = makeRoot({ "d/x": "1" });
    using folder = makeRoot({ f: randomBytes(20_001) });
    const file = join(folder.path, "tokens.json");
    const added = Bun.spawnSync(
      [process.execPath, join(HOME, "server.ts")].concat([
        "token",
        "add",
        "guest",
        "--access",
        "write",
        "--folder",
        "d",
        "--tokens",
        file,
      ]),
    );
    await using server = await startServer(root.path, writable("--max-upload", "20000", "--tokens", file));
    const env = { REPRISE_TOKEN: added.stdout.toString().trim() };
    const run = await runClient(server.address, ["put", "f"], { cwd: folder.path, env });
    expect(run.status).toBe(4);
    expect(run.errors).toContain('"f" is larger than the 20000 bytes');
    expect((await runClient(server.address, ["cat", "x"], { env })).output).toBe("1");
  });

  test("put -r goes on with the rest: a line for each that is too large, status 4", async () => {
    using root = makeRoot({});
    using folder = temporaryFolder();
    const small = Object.fromEntries(Array.from({ length: 300 }, (_, index) => [`a/${index}`, randomBytes(99, index)]));
    const large = { "a/x": randomBytes(40_000), "b/y": randomBytes(100_000), "b/z": randomBytes(3 * MIB) };
    writeTree(join(folder.path, "t"), { ...small, ...large });
    await using server = await startServer(root.path, writable("--max-upload", "30000"));
    const run = await runClient(server.address, ["put", "-r", "t"], { cwd: folder.path });
    expect(run.status).toBe(4);
    const wanted = Object.keys(large).map(
      (name) => `error: refused: "t/${name}" is larger than the 30000 bytes that the server takes (--max-upload)`,
    );
    expect(lines(run.errors).sort()).toEqual(wanted.sort());
    for (const [name, content] of Object.entries(small)) {
      expect(readFileSync(join(root.path, "t", name))).toEqual(Buffer.from(content));
    }
    for (const name of Object.keys(large)) expect(existsSync(join(root.path, "t", name))).toBe(false);
    await waitFor("nothing is left of it", () => staged(root.path).length === 0);
    expect(existsSync(join(folder.path, "client_root"))).toBe(false);
  });
});

// ---------------------------------------------------------------------------------------------------- --keep-free

describe.skipIf(!canMount)("--keep-free", () => {
  test("the default keeps 64 MiB: refused before any content where the size is known", async () => {
    using small = mountSmall("70M");
    if (!small) return;
    await using server = await startServer(small.path, writable());
    using it = await speak(server.port);
    await it.ask(put({ size: 10 * MIB }));
    expect(await it.error()).toMatchObject({
      code: "no_room",
      text: 'no room on the server for "f", of which it keeps 64M free (--keep-free); make room there and put it again',
    });
    expect(staged(small.path)).toEqual([]);
    await it.send(encodeEnd(0), encodeRequest(put({ id: "", size: 2, content: Buffer.from("ok") })));
    expect(await it.answer(1)).toMatchObject({ type: "meta", size: 2 });
  });

  test("0 keeps nothing free", async () => {
    using small = mountSmall("2M");
    if (!small) return;
    using folder = makeRoot({ f: randomBytes(MIB) });
    await using server = await startServer(small.path, writable("--keep-free", "0"));
    expect(await runClient(server.address, ["put", "f"], { cwd: folder.path })).toMatchObject({ status: 0 });
  });

  test("room that goes in the middle: what is held stays, and it goes on when there is some", async () => {
    using small = mountSmall("64M");
    if (!small) return;
    await using server = await startServer(small.path, writable("--keep-free", "8M"));
    const content = randomBytes(20 * MIB);
    const pieces = Array.from({ length: 40 }, (_, index) =>
      content.subarray(index * MAX_CONTENT_BYTES, (index + 1) * MAX_CONTENT_BYTES),
    );
    using it = await speak(server.port);
    await it.ask(put({ size: content.length }));
    await it.data(pieces[0]!);
    await waitFor("some is held", () => heldBytes(small.path) === MAX_CONTENT_BYTES);
    const filler = join(small.path, "filler");
    writeFileSync(filler, new Uint8Array(freeBytes(small.path) - 8 * MIB));
    // It may take as much as it was allowed before, 4 MiB, and no more.
    for (const piece of pieces.slice(1, 10)) await it.data(piece);
    expect(await it.error()).toMatchObject({ code: "no_room" });
    await it.send(encodeEnd(0), encodeRequest({ action: "stat", path: "filler" }));
    expect(await it.answer(1)).toMatchObject({ type: "meta" });
    const held = heldBytes(small.path);
    expect(held).toBeGreaterThanOrEqual(MAX_CONTENT_BYTES);
    expect(held).toBeLessThanOrEqual(4 * MIB);
    writeFileSync(filler, "");
    await it.ask(put({ size: content.length, offset: held }));
    for (let at = held; at < content.length; at += MAX_CONTENT_BYTES) {
      await it.data(content.subarray(at, Math.min(content.length, at + MAX_CONTENT_BYTES)));
    }
    await it.send(encodeEnd(content.length - held));
    expect(await it.answer(2)).toMatchObject({ type: "meta", size: content.length });
    expect(Buffer.compare(readFileSync(join(small.path, "f")), content)).toBe(0);
  });

  test.each(["known", "unknown"])("many at once, of %s size, over two workers leave it", async (kind) => {
    using small = mountSmall("64M");
    if (!small) return;
    using folder = temporaryFolder();
    await using server = await startServer(small.path, writable("--keep-free", "16M"));
    const content = randomBytes(8 * MIB);
    writeFileSync(join(folder.path, "f"), content);
    let least = Number.POSITIVE_INFINITY;
    const timer = setInterval(() => {
      least = Math.min(least, freeBytes(small.path));
    }, 1);
    const runs = await Promise.all(
      Array.from({ length: 8 }, (_, index) =>
        kind === "known"
          ? runClient(server.address, ["put", "f", "-t", `${index}`, "-d", `${index}`], { cwd: folder.path })
          : runClient(server.address, ["put", "-", "-t", `${index}`], { cwd: folder.path, stdin: content }),
      ),
    );
    clearInterval(timer);
    // One worker may not have seen the last 4 MiB of the other; names and what is not a whole page come on top.
    expect(least).toBeGreaterThanOrEqual(16 * MIB - 4 * MIB - 512 * 1024);
    expect(runs.some(({ status }) => status === 9)).toBe(true);
    for (const [index, { status, errors }] of runs.entries()) {
      expect([0, 9]).toContain(status);
      if (status === 0) expect(Buffer.compare(readFileSync(join(small.path, `${index}`)), content)).toBe(0);
      else expect(errors).toContain("it keeps 16M free (--keep-free)");
    }
  });

  test("small files count with the blocks that they take", async () => {
    using small = mountSmall("16M");
    if (!small) return;
    using folder = temporaryFolder();
    mkdirSync(join(folder.path, "t"));
    for (let index = 0; index < 3000; index++) writeFileSync(join(folder.path, `t/${index}`), "1");
    await using server = await startServer(small.path, writable("--keep-free", "8M"));
    const run = await runClient(server.address, ["put", "-r", "t", "--jobs", "1"], { cwd: folder.path });
    expect(run.status).toBe(9);
    const there = readdirSync(join(small.path, "t")).length;
    expect(lines(run.errors).length).toBe(3000 - there);
    // One connection, and so one worker that takes what it sees.
    expect(freeBytes(small.path)).toBeGreaterThanOrEqual(8 * MIB - 64 * 1024);
    expect(there).toBeGreaterThan(1900);
  });

  test("what was taken and is not yet written counts", async () => {
    using small = mountSmall("64M");
    if (!small) return;
    const changes = openChanges(small.path, { keepFree: 40 * MIB });
    const chunk = randomBytes(MAX_CONTENT_BYTES);
    const uploads: FolderUpload[] = [];
    const writes: Promise<void>[] = [];
    let refusals = 0;
    for (let index = 0; index < 100; index++) {
      const upload = changes.receive(put({ id: "" }), true);
      uploads.push(upload);
      const refused = () => void refusals++;
      writes.push(upload.append(chunk, Bun.hash.crc32(chunk), () => {}).catch(refused));
    }
    await Promise.all(writes);
    for (const upload of uploads) await upload.settle();
    expect(refusals).toBeGreaterThanOrEqual(100 - (24 * MIB) / MAX_CONTENT_BYTES);
    expect(writes.length - refusals).toBeGreaterThanOrEqual((4 * MIB) / MAX_CONTENT_BYTES);
    expect(freeBytes(small.path)).toBeGreaterThanOrEqual(40 * MIB);
    for (const upload of uploads) upload.close();
    // All of it was given back.
    const upload = changes.receive(put({ id: "", size: 23 * MIB }), true);
    upload.close();
    await changes.leave(small.path, ".reprise");
  });
});

// ---------------------------------------------------------------------------------------------------- --max-list

describe("--max-list", () => {
  const tree = (count: number) =>
    Object.fromEntries(Array.from({ length: count }, (_, index) => [`${index % 2}/${index}`, ""]));

  test.each([9, 10, 11])("of 10: %d entries in all, folders included", async (count) => {
    using root = makeRoot(tree(count - 2));
    await using server = await startServer(root.path, { args: ["--max-list", "10"] });
    const run = await runClient(server.address, ["ls", "-r"]);
    if (count <= 10) {
      expect(run).toMatchObject({ status: 0, errors: "" });
      expect(lines(run.output).length).toBe(count);
    } else {
      expect(run.status).toBe(4);
      expect(lines(run.errors)).toEqual([
        "error: refused: the list has more than 10 entries (--max-list); list its folders one by one",
      ]);
    }
    expect((await runClient(server.address, ["ls", "0"])).status).toBe(0);
  });

  test("one folder that alone has more", async () => {
    using root = makeRoot(tree(30));
    await using server = await startServer(root.path, { args: ["--max-list", "10"] });
    const run = await runClient(server.address, ["ls", "0"]);
    expect(run.status).toBe(4);
    expect(run.errors).toContain('the list of "0" has more than 10 entries (--max-list); ask for what is in it by its');
    expect((await runClient(server.address, ["cat", "0/0", "1/1"])).status).toBe(0);
  });

  test("get -r of more says so, and removes nothing with sync --delete", async () => {
    using root = makeRoot(tree(30));
    using folder = makeRoot({ "mine/x": "1" });
    await using server = await startServer(root.path, { args: ["--max-list", "10"] });
    const get = await runClient(server.address, ["get", "-r", "/"], { cwd: folder.path });
    expect(get).toMatchObject({ status: 4 });
    const sync = await runClient(server.address, ["sync", "--delete", "/", "mine"], { cwd: folder.path });
    expect(sync).toMatchObject({ status: 4 });
    expect(readFileSync(join(folder.path, "mine/x"), "utf8")).toBe("1");
  });
});

test.each([
  ["--max-upload", "0"],
  ["--max-upload", "much"],
  ["--keep-free", "-1"],
  ["--keep-free", "some"],
  ["--max-list", "0"],
])("%s %s is a usage error", async (option, value) => {
  using root = makeRoot({});
  const child = Bun.spawn({
    cmd: [process.execPath, join(HOME, "server.ts"), root.path, "--port", "0", `${option}=${value}`],
    stdio: ["ignore", "ignore", "pipe"],
  });
  expect(await new Response(child.stderr).text()).toContain(`error: ${option} takes `);
  expect(await child.exited).toBe(2);
});
