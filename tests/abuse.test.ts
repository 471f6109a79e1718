/**
 * Names, requests and peers that mean harm, row by row as they are numbered in the list of what a file server meets.
 *
 * Real servers, raw sockets, and the client where it is concerned. Where names are resolved, everything is asked of a
 * server with openat2 and of one without the C library (the walk from descriptor to descriptor), and with every action
 * that takes a name. Row 24 (tokens) is in the tests of tokens. Three things take their size from the environment:
 *
 * ```sh
 * REPRISE_RACES=1000000 bun test tests/abuse.test.ts -t "row 13"
 * REPRISE_FUZZ_FRAMES=1000000 REPRISE_FUZZ_SEED=7 bun test tests/abuse.test.ts -t "row 20"
 * ```
 */
import { afterAll, beforeAll, describe, expect, setDefaultTimeout, test } from "bun:test";
import { spawnSync } from "node:child_process";
import {
  existsSync,
  linkSync,
  mkdirSync,
  readdirSync,
  readFileSync,
  renameSync,
  symlinkSync,
  truncateSync,
  unlinkSync,
  utimesSync,
  writeFileSync,
} from "node:fs";
import { connect } from "node:net";
import { join } from "node:path";
import {
  type Answer,
  decodeAnswer,
  decodeContent,
  decodeHello,
  decodeRequest,
  EntriesEncoder,
  type ErrorCode,
  encodeDataHeader,
  encodeEnd,
  encodeError,
  encodeFile,
  encodeHello,
  encodeInfo,
  encodeMeta,
  encodeRedirect,
  encodeRequest,
  encodeSum,
  encodeWait,
  encodeWelcome,
  type Frame,
  FrameDecoder,
  FrameType,
  HEADER_BYTES,
  MAX_ANSWER_BYTES,
  MAX_CONTENT_BYTES,
  MAX_REQUEST_BYTES,
  type Put,
  RepriseError,
  type Request,
  TO_THE_END,
  UNKNOWN_SIZE,
} from "../protocol.ts";
import {
  connectRaw,
  contentFrames,
  HOME,
  makeRoot,
  type RawConnection,
  randomBytes,
  residentBytes,
  runClient,
  type Server,
  type ServerOptions,
  startFakeServer,
  startServer,
  TEST_MS,
  temporaryFolder,
  treeOf,
  waitFor,
  writeLargeFile,
  writeTree,
} from "./fixtures.ts";
import { makeArena, type Race, type Tally } from "./races.ts";

setDefaultTimeout(TEST_MS);

const isRoot = process.getuid?.() === 0;
/** Where nothing has to be synced. */
const MEMORY = existsSync("/dev/shm") ? "/dev/shm" : undefined;

// ---------------------------------------------------------------------------------------------------- wire

const request = (request: Request) => encodeRequest(request);
const get = (path: string, fields: { offset?: number; length?: number; etag?: string } = {}) =>
  request({ action: "get", path, offset: 0, length: TO_THE_END, etag: "", ...fields });
const quit = request({ action: "quit" });
const put = (path: string, fields: Partial<Put> = {}) =>
  request({
    ...{ action: "put", path, id: "", offset: 0, size: UNKNOWN_SIZE, mtime: 0, noClobber: false, parents: false },
    ...{ etag: "", ...fields },
  } as Put);
const data = (content: Uint8Array) =>
  Buffer.concat([encodeDataHeader(content.length, Bun.hash.crc32(content)), content]);
const whole = (path: string, text: string, fields: Partial<Put> = {}) => {
  const content = new TextEncoder().encode(text);
  return put(path, { size: content.length, content, ...fields });
};

/** A frame that no encoder would make. */
function frame(type: number, payload: Uint8Array): Uint8Array {
  const head = Buffer.alloc(HEADER_BYTES);
  head.writeUInt32BE(payload.length);
  head[4] = type;
  head.writeUInt32BE(Bun.hash.crc32(payload, Bun.hash.crc32(head.subarray(0, 5))), 5);
  return Buffer.concat([head, payload]);
}

const CONTENT = "put by force";

/** Every action that takes a name, each with what is answered once if it is refused. */
const actions: Record<string, (path: string) => Uint8Array> = {
  get: (path) => get(path),
  "get of a part": (path) => get(path, { offset: 1, length: 1 }),
  list: (path) => request({ action: "list", path, recursive: false }),
  "list -r": (path) => request({ action: "list", path, recursive: true }),
  stat: (path) => request({ action: "stat", path }),
  sums: (path) => request({ action: "sums", id: "", path }),
  put: (path) => whole(path, CONTENT),
  "put with the folders above": (path) => whole(path, CONTENT, { parents: true }),
  "put in pieces": (path) => Buffer.concat([put(path), ...contentFrames(CONTENT)]),
  "put of a large file": (path) => Buffer.concat([put(path, { size: 2 ** 30 }), ...contentFrames(CONTENT)]),
  remove: (path) => request({ action: "remove", path, recursive: false }),
  "remove -r": (path) => request({ action: "remove", path, recursive: true }),
  "move from": (path) => request({ action: "move", path, to: "moved-here", overwrite: true }),
  "move to": (path) => request({ action: "move", path: "movable", to: path, overwrite: false }),
  "move over": (path) => request({ action: "move", path: "movable", to: path, overwrite: true }),
  mkdir: (path) => request({ action: "mkdir", path, parents: false }),
  "mkdir -p": (path) => request({ action: "mkdir", path, parents: true }),
};

function decodeAll(bytes: Uint8Array): Answer[] {
  const decoder = new FrameDecoder({ maxLength: MAX_ANSWER_BYTES });
  decoder.push(bytes);
  const answers: Answer[] = [];
  for (let next = decoder.next(); next; next = decoder.next()) answers.push(decodeAnswer(next));
  return answers;
}

/** Says HELLO and all of this, and returns what was answered behind WELCOME until the server closed. */
async function talk(port: number, ...frames: Uint8Array[]): Promise<Answer[]> {
  return decodeAll(await exchange(port, Buffer.concat([encodeHello(), ...frames]))).slice(1);
}

/** Sends bytes, and if `ends` the end of the stream, and reads until the server closes. */
function exchange(port: number, bytes: Uint8Array, ends = false): Promise<Buffer> {
  const { promise, resolve } = Promise.withResolvers<Buffer>();
  const chunks: Buffer[] = [];
  const socket = connect({ host: "127.0.0.1", port }, () => void (ends ? socket.end(bytes) : socket.write(bytes)));
  socket.on("data", (chunk: Buffer) => void chunks.push(chunk));
  socket.on("error", () => {});
  socket.on("close", () => resolve(Buffer.concat(chunks)));
  return promise;
}

function brief(answer: Answer): string {
  if (answer.type === "error") return answer.error.code;
  if (answer.type === "data" || answer.type === "file") return Buffer.from(answer.content).toString();
  if (answer.type === "entries") return `list ${answer.entries.map(({ path }) => path).sort()}`;
  return answer.type === "meta" ? `meta ${answer.kind} ${answer.size}` : answer.type;
}

const converse = async (port: number, ...frames: Uint8Array[]) => (await talk(port, ...frames, quit)).map(brief);

// ---------------------------------------------------------------------------------------------------- place

/** A served root within a folder of which nothing else may be read or touched. */
interface Place extends AsyncDisposable {
  outer: string;
  root: string;
  server: Server;
}

async function setUp(ffi: string, options: ServerOptions & { parent?: string } = {}): Promise<Place> {
  const outer = makeRoot(
    {
      secret: "outside",
      "outside/secret": "outside",
      "rootb/secret": "twin",
      "root/movable": "movable",
      "root/file": "inside",
      "root/sub/x": "x",
    },
    options.parent,
  );
  const root = join(outer.path, "root");
  const args = ["--writable", ...(options.args ?? [])];
  const server = await startServer(root, { ...options, args, env: { REPRISE_FFI: ffi, ...options.env } });
  return {
    outer: outer.path,
    root,
    server,
    async [Symbol.asyncDispose]() {
      await server[Symbol.asyncDispose]();
      outer[Symbol.dispose]();
    },
  };
}

const READS = ["get", "get of a part", "list", "list -r", "stat", "sums"];

/** Every action on each of the names is refused with one of the codes, and nothing at all is touched by it. */
async function expectRefused(it: Place, names: string[], codes: ErrorCode[], which = Object.keys(actions)) {
  const before = treeOf(it.outer);
  for (const name of names) {
    const answers = await talk(it.server.port, ...which.map((action) => actions[action]!(name)), quit);
    const found = answers.map((answer, index) => `${which[index] ?? "quit"}: ${brief(answer)}`);
    const wrong = found.slice(0, -1).filter((line) => !codes.includes(line.split(": ")[1] as ErrorCode));
    expect({ name, wrong, count: found.length }).toEqual({ name, wrong: [], count: which.length + 1 });
    for (const answer of answers) {
      if (answer.type !== "error") continue;
      if (!name.includes(it.outer)) expect(answer.error.message).not.toContain(it.outer);
      if (answer.error.code === "bad_name") expect(answer.error.message).toStartWith("not found");
    }
  }
  expect(treeOf(it.outer)).toEqual(before);
}

describe.each(["1", "0"])("names (REPRISE_FFI=%s)", (ffi) => {
  let it: Place;
  beforeAll(async () => {
    it = await setUp(ffi);
  });
  afterAll(() => it[Symbol.asyncDispose]());

  test("row 1: ../../etc/passwd is refused in the words of `not found`", async () => {
    await expectRefused(it, ["../../etc/passwd", "..", "../secret", "../outside/secret"], ["bad_name"]);
    const [above, missing] = await talk(it.server.port, get("../secret"), get("none"), quit);
    for (const answer of [above, missing]) {
      expect(answer?.type === "error" && answer.error.message).toStartWith("not found: ");
    }
  });

  test("row 2: /etc/passwd and //x are refused", async () => {
    await expectRefused(it, ["/etc/passwd", "//x", "//etc/passwd", "/", "//", `${it.outer}/secret`], ["bad_name"]);
  });

  test("row 3: a/../../x, ./ and empty segments are refused", async () => {
    const names = [
      "sub/../../secret",
      "sub/..",
      "sub/../file",
      "./",
      ".",
      "./file",
      "sub/.",
      "sub//x",
      "sub/",
      "file/",
    ];
    await expectRefused(it, names, ["bad_name"]);
  });

  test("row 4: %2e%2e%2f, also twice encoded, is a literal name", async () => {
    await expectRefused(
      it,
      ["%2e%2e/secret", "%2e%2e/outside/secret"],
      ["not_found"],
      [...READS, ...["put", "remove", "move from", "move to", "mkdir"]],
    );
    for (const name of ["%2e%2e%2fsecret", "%252e%252e%252fsecret", "%00", "%2fetc%2fpasswd"]) {
      expect(await converse(it.server.port, get(name))).toEqual(["not_found", "end"]);
      await expectLiteral(it, name);
    }
  });

  test("row 5: backslashes, drive letters and UNC are literal names, never separators", async () => {
    const names = [
      "..\\secret",
      "..\\..\\secret",
      "C:\\x",
      "C:",
      "\\\\host\\share\\x",
      "\\\\?\\C:\\x",
      "sub\\x",
      "a:b",
    ];
    for (const name of names) {
      expect(await converse(it.server.port, get(name))).toEqual(["not_found", "end"]);
      await expectLiteral(it, name);
    }
  });

  test("row 6: NUL in a name is refused", async () => {
    await expectRefused(it, ["file\0", "\0", "fi\0le", "sub/x\0.png", "../secret\0.png", "new/x\0"], ["bad_name"]);
  });

  test("row 7: CR or LF in a name is refused, and no line of the log is split by it", async () => {
    const names = ["a\nb", "a\rb", "\n", '{"event":"forged"}\n{"event":"forged"}', "sub/x\r\n", "sub\n/x"];
    await expectRefused(it, names, ["bad_name"]);
    // The two moves to such a name are logged under the name that they are from.
    const count = names.length * (Object.keys(actions).length - 2);
    const own = () => it.server.log.filter(({ path }) => path !== undefined && /[\r\n]/.test(path));
    await waitFor("all is logged", () => own().length === count);
    expect(new Set(own().map(({ path }) => path))).toEqual(new Set(names));
    expect(it.server.log.filter(({ event }) => event === "forged")).toEqual([]);
    writeFileSync(join(it.root, "sub", "new\nline"), "");
    expect(await converse(it.server.port, actions.list!("sub"))).toEqual(["list x", "end", "end"]);
    unlinkSync(join(it.root, "sub", "new\nline"));
  });

  test("row 8: overlong, cut and otherwise invalid UTF-8 is refused", async () => {
    const before = treeOf(it.outer);
    const bad = [
      "c0ae c0ae 2f 73",
      "c0af",
      "2e2e c0af 73",
      "e080af",
      "f08080af",
      "ff",
      "61 ff",
      "eda080",
      "f09f",
      "80",
    ];
    for (const text of bad) {
      const bytes = Buffer.from(text.replaceAll(" ", ""), "hex");
      for (const action of Object.keys(actions)) {
        // In place of a name of the same length.
        const frames = Buffer.from(actions[action]!("~".repeat(bytes.length)));
        const length = HEADER_BYTES + frames.readUInt32BE(0);
        const payload = frames.subarray(HEADER_BYTES, length);
        bytes.copy(payload, payload.indexOf("~"));
        const answers = await talk(it.server.port, frame(frames[4]!, payload), frames.subarray(length), quit);
        expect({ text, action, answers: answers.map(brief) }).toEqual({ text, action, answers: ["bad_frame"] });
      }
    }
    expect(treeOf(it.outer)).toEqual(before);
    const odd = ["\xff", "\xc0\xaf"].map((name) => Buffer.from(`${it.root}/sub/${name}`, "latin1"));
    for (const name of odd) writeFileSync(name, "");
    expect(await converse(it.server.port, actions.list!("sub"))).toEqual(["list x", "end", "end"]);
    for (const name of odd) unlinkSync(name);
  });

  test("row 9: NFC and NFD, and twins in case, are distinct names", async () => {
    const names = ["\u00e9", "e\u0301", "E\u0301", "\u00c9", "twin", "TWIN", "Twin", "\u212b", "\u00c5", "ﬁ", "fi"];
    const frames = names.flatMap((name) => [whole(`twins/${name}`, name, { parents: true, noClobber: true })]);
    expect((await converse(it.server.port, ...frames)).filter((line) => !line.startsWith("meta"))).toEqual(["end"]);
    using folder = temporaryFolder();
    const { status, errors } = await runClient(it.server.address, ["get", "-r", "twins", "-d", folder.path, "-q"]);
    expect({ status, errors }).toEqual({ status: 0, errors: "" });
    for (const top of [it.root, folder.path]) {
      for (const name of names) expect(readFileSync(join(top, "twins", name), "utf8")).toBe(name);
      expect(readdirSync(join(top, "twins")).length).toBe(names.length);
    }
    // One that is moved or removed is that one.
    const [first, second] = names as [string, string];
    const move = request({ action: "move", path: `twins/${first}`, to: "twins/other", overwrite: false });
    expect(await converse(it.server.port, move, get(`twins/${second}`), get(`twins/${first}`))).toEqual([
      ...["end", "meta file 3", second, "end"],
      ...["not_found", "end"],
    ]);
  });

  test("row 11: a segment of 256 bytes and a path over 4,096 get a clear error", async () => {
    const long = ["a".repeat(256), `sub/${"é".repeat(128)}`, `${"a".repeat(256)}/x`];
    await expectRefused(it, long, ["bad_name"]);
    const [answer] = await talk(it.server.port, get(long[0]!), quit);
    expect(answer?.type === "error" && answer.error.message).toContain("at most 255 bytes");
    // As long as a path can be, and not there: only the first segment could be made.
    const most = `${"d/".repeat(2047)}dd`;
    await expectRefused(it, [most], ["not_found"], [...READS, "put", "remove", "remove -r", "move from", "mkdir"]);
    const before = treeOf(it.outer);
    const path = Buffer.from(`${"d/".repeat(2500)}`);
    const str = Buffer.concat([Buffer.from([path.length >> 8, path.length & 255]), path]);
    for (const type of [FrameType.STAT, FrameType.LIST, FrameType.MKDIR, FrameType.REMOVE]) {
      const payload = type === FrameType.STAT ? str : Buffer.concat([Buffer.alloc(1), str]);
      const [answer] = await talk(it.server.port, frame(type, payload), quit);
      expect(answer?.type === "error" && answer.error.message).toContain("5000 bytes where 4096 are allowed");
    }
    for (const args of [["get"], ["cat"], ["ls"], ["stat"], ["rm"], ["mkdir"], ["put", __filename, "-t"]]) {
      for (const name of ["n".repeat(256), `${"d/".repeat(2499)}d`]) {
        const { status, errors } = await runClient(it.server.address, [...args, name]);
        expect({ args, status, errors: errors.trim().split("\n") }).toEqual({
          args,
          status: 4,
          errors: [expect.stringContaining("at most 255 bytes and a path 4096")],
        });
      }
    }
    expect(treeOf(it.outer)).toEqual(before);
  });

  test("row 12: a symlink is refused, wherever it leads and wherever in a path it stands", async () => {
    const links = { out: "../secret", absolute: "/etc/passwd", up: "..", folder: "../outside", in: "file", sub: "sub" };
    mkdirSync(join(it.root, "links"));
    for (const [name, target] of Object.entries({ ...links, chain: "out", loop: "loop", dead: "nowhere" })) {
      const from = target.startsWith("/") ? target : join("..", target);
      symlinkSync(["chain", "loop", "dead"].includes(name) ? target : from, join(it.root, "links", name));
    }
    const codes: ErrorCode[] = ["refused", "not_found", "not_a_folder", "exists"];
    await expectRefused(
      it,
      readdirSync(join(it.root, "links")).map((name) => `links/${name}`),
      codes,
    );
    const below = [
      "folder/secret",
      "folder/new",
      "up/secret",
      "up/root/file",
      "sub/x",
      "sub/new/deep",
      "out/x",
      "loop/x",
    ];
    await expectRefused(
      it,
      below.map((name) => `links/${name}`),
      codes,
    );
    expect(await converse(it.server.port, actions["list -r"]!("links"))).toEqual(["end", "end"]);
    using folder = temporaryFolder();
    const { status } = await runClient(it.server.address, ["get", "-r", "links", "-d", folder.path, "-q"]);
    expect([status, treeOf(folder.path)]).toEqual([0, ["links folder"]]);
    // A folder goes with the links in it, and not with what they lead to.
    expect(await converse(it.server.port, actions["remove -r"]!("links"))).toEqual(["end", "end"]);
    expect(readFileSync(join(it.outer, "outside/secret"), "utf8")).toBe("outside");
    expect(readFileSync(join(it.root, "sub/x"), "utf8")).toBe("x");
  });

  test("row 14: FIFO, socket and device: never waited for, and refused", async () => {
    const place = join(it.root, "odd");
    mkdirSync(place);
    expect(spawnSync("mkfifo", [join(place, "fifo")]).status).toBe(0);
    const listener = Bun.listen({ unix: join(place, "socket"), socket: { data() {} } });
    const devices = { zero: ["c", "1", "5"], tty: ["c", "5", "0"], loop: ["b", "7", "0"] };
    for (const [name, numbers] of Object.entries(isRoot ? devices : {}))
      spawnSync("mknod", [join(place, name), ...numbers]);
    if (!isRoot) console.log("skipped: devices, which only root can make");
    const names = readdirSync(place).map((name) => `odd/${name}`);
    expect(names.length).toBe(isRoot ? 5 : 2);
    await expectRefused(it, names, ["refused", "not_a_folder", "exists"]);
    await expectRefused(
      it,
      names.map((name) => `${name}/x`),
      ["not_found", "not_a_folder"],
    );
    expect(await converse(it.server.port, actions.list!("odd"))).toEqual(["end", "end"]);
    listener.stop(true);
  });

  test("row 15: a hard link is the file that it links to, as the README says", async () => {
    linkSync(join(it.outer, "secret"), join(it.root, "hard-link"));
    expect(await converse(it.server.port, get("hard-link"))).toEqual(["meta file 7", "outside", "end", "end"]);
    // What is put in its place is another file: the one outside stays.
    expect(await converse(it.server.port, whole("hard-link", "new"))).toEqual(["meta file 3", "end"]);
    expect(readFileSync(join(it.outer, "secret"), "utf8")).toBe("outside");
    expect(readFileSync(join(HOME, "README.md"), "utf8")).toContain("a hard link within the root to a file outside");
  });

  test("row 16: names of the server's own are never listed, served or written", async () => {
    const own = [".reprise/x", ".reprise-1/x", "a.part", ".part", "deep/.reprise/x", "deep/a.part", "deep/b.part/x"];
    writeTree(it.root, Object.fromEntries(own.map((name) => [name, "own"])));
    const others = [
      ".reprise",
      ".reprise/lock",
      ".reprise-new",
      "deep/.reprise",
      "deep/b.part",
      "new.part",
      "new/a.part",
    ];
    const names = [...own, ...others];
    await expectRefused(it, names, ["not_found"], READS);
    const changing = Object.keys(actions).filter((action) => !READS.includes(action));
    await expectRefused(it, names, ["refused", "not_found"], changing);
    expect(await converse(it.server.port, actions["list -r"]!("deep"))).toEqual(["end", "end"]);
    // What is being received is not to be seen either.
    using uploading = await connectRaw(it.server.port);
    const id = "0123456789abcdef".repeat(2);
    uploading.socket.write(Buffer.concat([encodeHello(), put("upload", { id }), data(new Uint8Array(1000))]));
    const isStaged = () => readdirSync(join(it.root, ".reprise")).includes(`put-${id}`);
    await waitFor("it is staged", isStaged);
    const [list] = await talk(it.server.port, actions["list -r"]!(""), quit);
    const shown = list?.type === "entries" ? list.entries.map(({ path }) => path) : [];
    expect(shown).toContain("file");
    expect(shown.filter((path) => /\.reprise|\.part|upload/.test(path))).toEqual([]);
    expect(await converse(it.server.port, get(`.reprise/put-${id}`), get("upload"))).toEqual([
      ...["not_found", "not_found", "end"],
    ]);
    uploading.socket.terminate();
    await waitFor("it is given up", () =>
      it.server.log.some(({ event, path }) => event === "put" && path === "upload"),
    );
  });

  test("row 17: the folder beside the root whose name begins as the root's does is outside", async () => {
    await expectRefused(it, ["../rootb/secret", "../rootb", "b/../../rootb/secret"], ["bad_name"]);
    symlinkSync("../rootb", join(it.root, "b"));
    await expectRefused(it, ["b", "b/secret"], ["refused", "not_found", "not_a_folder", "exists"]);
    await using slash = await startServer(`${it.root}/`, { env: { REPRISE_FFI: ffi } });
    expect(await converse(slash.port, get("b/secret"), get("../rootb/secret"), get("file"))).toEqual([
      ...[expect.stringMatching(/refused|not_found/), "bad_name", "meta file 6", "inside", "end", "end"],
    ]);
  });

  test("row 18: offsets and lengths that cannot be, that are past the end, that are nothing", async () => {
    const path = Buffer.from("\0\x04file");
    const get64 = (offset: string, length: string) =>
      frame(FrameType.GET, Buffer.concat([Buffer.from(offset + length, "hex"), Buffer.alloc(2), path]));
    const [zero, all] = ["0".repeat(16), "001fffffffffffff"];
    for (const bad of ["ffffffffffffffff", "8000000000000000", "0020000000000000", "7fffffffffffffff"]) {
      expect(await converse(it.server.port, get64(bad, all))).toEqual(["bad_frame"]);
      expect(await converse(it.server.port, get64(zero, bad))).toEqual(["bad_frame"]);
    }
    expect(
      await converse(
        it.server.port,
        ...[get64(zero, all), get("file", { offset: 6 }), get("file", { offset: 7 }), get("file", { length: 0 })],
        ...[get("file", { offset: TO_THE_END }), get("file", { offset: 5, length: TO_THE_END })],
        ...[get("file", { offset: 6, length: 0 }), get("file", { offset: 2, length: 2 })],
      ),
    ).toEqual([
      ...["meta file 6", "inside", "end"],
      ...["meta file 6", "end"],
      "bad_range",
      ...["meta file 6", "end"],
      "bad_range",
      ...["meta file 6", "e", "end"],
      ...["meta file 6", "end"],
      ...["meta file 6", "si", "end"],
      "end",
    ]);
    const id = "f".repeat(32);
    const before = treeOf(it.root);
    for (const fields of [{ offset: 1 }, { id, offset: 1 }, { id, offset: TO_THE_END, size: TO_THE_END }]) {
      expect(await converse(it.server.port, put("new", fields), ...contentFrames("x"))).toEqual(["bad_range", "end"]);
    }
    expect(treeOf(it.root)).toEqual(before);
  });
});

/** A name that looks like more is a name like any other: put, listed, got, moved and removed, right in the root. */
async function expectLiteral(it: Place, name: string): Promise<void> {
  const before = treeOf(it.outer);
  expect(await converse(it.server.port, whole(name, CONTENT), get(name), actions.list!(""))).toEqual([
    ...["meta file 12", "meta file 12", CONTENT, "end"],
    ...[expect.stringContaining(name), "end", "end"],
  ]);
  expect(readFileSync(join(it.root, name), "utf8")).toBe(CONTENT);
  const move = request({ action: "move", path: name, to: "moved", overwrite: false });
  const back = request({ action: "move", path: "moved", to: name, overwrite: false });
  expect(await converse(it.server.port, move, back, actions.remove!(name))).toEqual(["end", "end", "end", "end"]);
  expect(await converse(it.server.port, actions.mkdir!(name), actions["remove -r"]!(name))).toEqual([
    "end",
    "end",
    "end",
  ]);
  // What a folder held is removed while others are served.
  const isSwept = () => !readdirSync(join(it.root, ".reprise")).some((name) => name.startsWith("trash"));
  await waitFor("the folder's content is removed", isSwept);
  expect(treeOf(it.outer)).toEqual(before);
}

// ---------------------------------------------------------------------------------------------------- races

/** Of each implementation, divided over what is raced. */
const RACES = Number(process.env.REPRISE_RACES ?? 100_000);
const SHARES: [Race, number][] = [
  ["last read", 0.3],
  ["middle read", 0.3],
  ["last write", 0.2],
  ["middle write", 0.2],
];

describe.each(["1", "0"])(`${RACES.toLocaleString("en")} races (REPRISE_FFI=%s)`, (ffi) => {
  test.each(SHARES)(
    "row 13: a name swapped for a link while it is resolved leaks nothing (%s)",
    async (race, share) => {
      using arena = temporaryFolder(MEMORY);
      makeArena(arena.path);
      const rounds = Math.ceil(RACES * share);
      const child = Bun.spawn(
        [process.execPath, join(HOME, "tests/races.ts"), arena.path, ...race.split(" "), String(rounds)],
        { env: { ...process.env, REPRISE_FFI: ffi }, stdio: ["ignore", "pipe", "pipe"] },
      );
      const [output, errors] = await Promise.all([
        new Response(child.stdout).text(),
        new Response(child.stderr).text(),
        child.exited,
      ]);
      expect(errors).toBe("");
      const { inside, refused } = JSON.parse(output) as Tally;
      expect(inside + refused).toBe(rounds);
      // Else there was no race.
      expect(inside).toBeGreaterThan(rounds / 50);
      expect(refused).toBeGreaterThan(rounds / 50);
    },
    RACES * 10,
  );
});

// ---------------------------------------------------------------------------------------------------- terminals and logs

const HOSTILE = "\x1b[31mred\x1b]0;title\x07\u202etxt.exe\u2066\x9b1m\x7f\u2028\t";

/** Nothing that a terminal would obey, and no line but those that were meant. */
function expectTame(text: string, what: string): void {
  expect({ what, wild: text.match(/[^\P{Cc}\n]|[\u061c\u200e\u200f\u2028-\u202e\u2066-\u2069]/gu) }).toEqual({
    what,
    wild: null,
  });
}

test("row 10: bidi and ANSI escapes are escaped in logs, in listings and in what the client says", async () => {
  using root = makeRoot({ [HOSTILE]: "wild", file: "tame" });
  for (const format of ["json", "pretty"]) {
    await using server = await startServer(root.path, { args: ["--log", format] });
    const runs = [["ls"], ["ls", "-l"], ["ls", "--json"], ["stat", HOSTILE], ["get", HOSTILE, "-d", root.path]];
    for (const args of [...runs, ["cat", `${HOSTILE}none`], ["stat", "--json", HOSTILE], ["rm", HOSTILE]]) {
      const { output, errors } = await runClient(server.address, args);
      expectTame(output + errors, args.join(" "));
    }
    await waitFor("it is logged", () =>
      server.stderr().includes("\\u202etxt.exe\\u2066\\u009b1m\\u007f\\u2028\\tnone"),
    );
    expectTame(server.stderr(), `the ${format} log`);
  }
});

test("row 10: what a hostile server says is escaped as well, and stays one line", async () => {
  const wild = `${HOSTILE}\nerror: forged line`;
  const entries = new EntriesEncoder();
  entries.add({ kind: "file", size: 1, mtime: 0, path: HOSTILE });
  const list = entries.rest()!;
  using server = startFakeServer(({ action }) => {
    if (action === "status") return [encodeInfo({ server: wild, [wild]: [wild] })];
    if (action === "list") return [list, encodeEnd(1)];
    if (action === "stat") return [encodeMeta({ kind: "file", size: 1, mtime: 0, etag: wild })];
    return [encodeError(new RepriseError("refused", wild))];
  });
  for (const args of [["status"], ["ls"], ["ls", "-l"], ["stat", "x"], ["rm", "x"], ["get", "x"], ["cat", "x"]]) {
    const { output, errors } = await runClient(server.address, [...args, "--retries", "0"]);
    expectTame(output + errors, args.join(" "));
    expect({ args, forged: /^error: forged/m.test(output + errors) }).toEqual({ args, forged: false });
  }
});

// ---------------------------------------------------------------------------------------------------- changing files

/** A connection that asks for something, and reads on only when it is told to. */
function deafReader(port: number, ...frames: Uint8Array[]) {
  const chunks: Buffer[] = [];
  const { promise: closed, resolve } = Promise.withResolvers<void>();
  const socket = connect({ host: "127.0.0.1", port }, () => socket.write(Buffer.concat([encodeHello(), ...frames])));
  socket.on("error", () => {});
  socket.on("close", () => resolve());
  socket.pause();
  return {
    socket,
    /** Reads to the end: the frames up to the first that is damaged or cut. */
    async readAll(): Promise<Answer[]> {
      socket.on("data", (chunk: Buffer) => void chunks.push(chunk));
      socket.resume();
      await closed;
      const decoder = new FrameDecoder({ maxLength: MAX_ANSWER_BYTES });
      decoder.push(Buffer.concat(chunks));
      const answers: Answer[] = [];
      try {
        for (let next = decoder.next(); next; next = decoder.next()) answers.push(decodeAnswer(next));
      } catch (error) {
        if (!(error instanceof RepriseError)) throw error;
      }
      return answers.slice(1);
    },
    [Symbol.dispose]: () => void socket.destroy(),
  };
}

describe.each(["1", "0"])("a file that changes (REPRISE_FFI=%s)", (ffi) => {
  const SIZE = 24 << 20;
  const changes: [string, boolean, (file: string) => void][] = [
    [
      "overwritten",
      false,
      (file) => void spawnSync("dd", ["if=/dev/zero", `of=${file}`, "bs=1M", "count=24", "conv=notrunc"]),
    ],
    ["truncated", false, (file) => truncateSync(file, SIZE / 2)],
    [
      "replaced by another",
      true,
      (file) => {
        writeLargeFile(`${file}.new`, SIZE, 9);
        renameSync(`${file}.new`, file);
      },
    ],
  ];
  test.each(changes)(
    "row 19: %s while it is sent: one version, or `changed`, never mixed bytes",
    async (_, isWhole, change) => {
      using root = makeRoot({});
      const file = join(root.path, "f");
      writeLargeFile(file, SIZE);
      const old = readFileSync(file);
      await using server = await startServer(root.path, { env: { REPRISE_FFI: ffi } });
      using reader = deafReader(server.port, get("f"), quit);
      const other = new Promise((resolve) => reader.socket.once("readable", resolve));
      await other;
      change(file);
      const answers = await reader.readAll();
      let bytes = 0;
      for (const answer of answers) {
        if (answer.type !== "data") continue;
        expect(old.subarray(bytes, bytes + answer.content.length).equals(answer.content)).toBe(true);
        bytes += answer.content.length;
      }
      const last = answers.map(brief).filter((line) => line === "end" || line === "changed");
      expect(answers[0]?.type).toBe("meta");
      expect(bytes === SIZE).toBe(isWhole);
      // Where sendfile was in the middle of a frame, there is no place for a word.
      if (isWhole) expect(last).toEqual(["end", "end"]);
      else expect(last[0]).not.toBe("end");
    },
  );

  test("row 19: changed between two runs: `changed`, and no byte of the other version", async () => {
    using root = makeRoot({ f: randomBytes(100_000) });
    await using server = await startServer(root.path, { env: { REPRISE_FFI: ffi } });
    const [meta] = await talk(server.port, get("f"), quit);
    const etag = meta?.type === "meta" ? meta.etag : "";
    expect(etag).not.toBe("");
    const rest = get("f", { offset: 50_000, etag });
    expect((await converse(server.port, rest)).filter((line) => /^(meta|end)/.test(line))).toEqual([
      "meta file 100000",
      "end",
      "end",
    ]);
    const ways: ((file: string) => void)[] = [
      (file) => writeFileSync(file, randomBytes(100_000, 2)),
      (file) => truncateSync(file, 60_000),
      (file) => utimesSync(file, 1, 1),
    ];
    for (const change of ways) {
      change(join(root.path, "f"));
      expect(await converse(server.port, rest, get("f", { offset: 0, etag }))).toEqual(["changed", "changed", "end"]);
    }
  });
});

// ---------------------------------------------------------------------------------------------------- frames

/** A server whose workers' memory is known from before. */
async function measured(options: ServerOptions & { parent?: string } = {}, ffi = "1") {
  const it = await setUp(ffi, { parent: MEMORY!, ...options, args: ["--workers", "1", ...(options.args ?? [])] });
  for (let round = 0; round < 3; round++) await converse(it.server.port, get("file"), actions.list!(""));
  const workers = it.server.workers();
  const before = await residentBytes(workers[0]!);
  return { it, workers, growth: async () => (await residentBytes(workers[0]!)) - before };
}

/** Those who were served before still are, by the processes that they were served by. */
async function expectUnharmed({ server }: Place, workers: number[]): Promise<void> {
  expect((await runClient(server.address, ["cat", "file", "--retries", "3"])).output).toBe("inside");
  expect(server.workers()).toEqual(workers);
  expect(server.log.filter(({ event }) => event === "bug")).toEqual([]);
}

test("row 20: a length of 2^32-1, of 0, one that lies: refused before anything is allocated", async () => {
  const { it, workers, growth } = await measured();
  await using place = it;
  const header = (length: number, type: number) => {
    const bytes = Buffer.alloc(HEADER_BYTES);
    bytes.writeUInt32BE(length);
    bytes[4] = type;
    return bytes;
  };
  for (const length of [2 ** 32 - 1, 2 ** 31, MAX_CONTENT_BYTES, MAX_REQUEST_BYTES + 1]) {
    const [answer] = await talk(place.server.port, header(length, FrameType.STAT));
    expect(answer?.type === "error" && answer.error.message).toContain(`a frame of ${length} bytes`);
    // Before HELLO there may be no word for who does not speak the protocol at all.
    const first = decodeAll(await exchange(place.server.port, header(length, FrameType.HELLO)));
    expect(first.map(brief).filter((line) => line !== "bad_frame")).toEqual([]);
  }
  for (const type of Object.values(FrameType).filter((type) => type !== FrameType.STATUS && type !== FrameType.QUIT)) {
    expect(await converse(place.server.port, frame(type, new Uint8Array(0)))).toEqual(["bad_frame"]);
  }
  // Shorter and longer than what is there.
  const good = Buffer.from(get("file"));
  for (const by of [-1, 1, 30]) {
    const bytes = Buffer.from(good);
    bytes.writeUInt32BE(bytes.readUInt32BE(0) + by);
    expect(await converse(place.server.port, bytes, get("file"), get("file"))).toEqual([
      expect.stringMatching(/checksum|bad_frame/),
    ]);
    const payload = good.subarray(HEADER_BYTES);
    const lying = by < 0 ? payload.subarray(0, by) : Buffer.concat([payload, Buffer.alloc(by)]);
    expect(await converse(place.server.port, frame(FrameType.GET, lying))).toEqual(["bad_frame"]);
  }
  // A thousand who announce as much as they may and send nothing of it.
  const peers = await Promise.all(Array.from({ length: 1000 }, () => connectRaw(place.server.port)));
  for (const [index, { socket }] of peers.entries()) {
    const announced =
      index % 2 === 0
        ? [header(MAX_REQUEST_BYTES, FrameType.STAT)]
        : [put("x"), header(MAX_CONTENT_BYTES, FrameType.DATA)];
    socket.write(Buffer.concat([encodeHello(), ...announced]));
  }
  await waitFor("all are greeted", () => peers.every((peer) => peer.received().length > 0));
  expect(await growth()).toBeLessThan(120e6);
  for (const peer of peers) peer[Symbol.dispose]();
  await expectUnharmed(place, workers);
});

/** Numbers below `limit`, the same for the same seed. */
function seeded(seed: number): (limit: number) => number {
  let state = seed;
  return (limit) => {
    state ^= state << 13;
    state ^= state >>> 17;
    state ^= state << 5;
    return (state >>> 0) % limit;
  };
}

const FUZZ_SEED = Number(process.env.REPRISE_FUZZ_SEED ?? 20_261_122);
const FUZZ_FRAMES = Number(process.env.REPRISE_FUZZ_FRAMES ?? 30_000);

function samples(): Uint8Array[] {
  const entries = new EntriesEncoder();
  for (const path of ["a", "b/c", "é"]) entries.add({ kind: "file", size: 5, mtime: -1, path });
  const meta = { kind: "file", size: 3, mtime: 1, etag: "0123456789abcdef" } as const;
  const id = "0123456789abcdef".repeat(2);
  return [
    ...Object.values(actions).map((action) => action("sub/x")),
    ...[encodeHello({ token: "t" }), request({ action: "status" }), request({ action: "sums", id, path: "" })],
    ...[put("f", { id, offset: 5, etag: "x" }), encodeWelcome("reprise"), encodeRedirect("host", 1)],
    ...[encodeError(new RepriseError("changed")), encodeMeta(meta, 1), encodeFile(meta, Buffer.from("abc"))],
    ...[encodeEnd(3), entries.rest()!, encodeInfo({ a: [1] }), encodeSum(5, 7), encodeWait(), data(randomBytes(300))],
  ].map((bytes) => Buffer.from(bytes).subarray(0, HEADER_BYTES + Buffer.from(bytes).readUInt32BE(0)));
}

/** A frame with a right checksum whose payload is another: bytes changed, cut off, put in. */
function mutated(sample: Uint8Array, random: (limit: number) => number): Uint8Array {
  let payload = Buffer.from(sample.subarray(HEADER_BYTES));
  for (let count = random(3); count > 0 && payload.length > 0; count--) {
    const at = random(payload.length);
    const how = random(4);
    if (how === 0) payload = payload.subarray(0, at);
    else if (how === 1)
      payload = Buffer.concat([
        payload.subarray(0, at),
        randomBytes(1 + random(9), 1 + random(1e6)),
        payload.subarray(at),
      ]);
    else payload[at] = how === 2 ? random(256) : payload[at]! ^ (1 << random(8));
  }
  const type = random(50) === 0 ? random(256) : sample[4]!;
  return frame(type, payload);
}

const decoders = [decodeRequest, decodeContent, decodeAnswer, decodeHello] as ((frame: Frame) => unknown)[];

test("row 20: a million fuzzed frames: decoded, or refused as they should be, in little memory", () => {
  const random = seeded(FUZZ_SEED);
  const all = samples();
  const { stackTraceLimit } = Error;
  Error.stackTraceLimit = 0;
  const tally = { frames: 0, decoded: 0, refused: 0, damaged: 0 };
  let before = 0;
  const decode = (frame: Frame) => {
    for (const decoder of [decoders[random(4)]!, decoders[random(4)]!]) {
      try {
        decoder(frame);
        tally.decoded++;
      } catch (error) {
        if (!(error instanceof RepriseError) || error.code !== "bad_frame") throw error;
        tally.refused++;
      }
    }
  };
  const decodeStream = (bytes: Uint8Array) => {
    const decoder = new FrameDecoder({ maxLength: MAX_REQUEST_BYTES });
    try {
      for (let at = 0; at < bytes.length; ) {
        const piece = bytes.subarray(at, at + 1 + random(200));
        decoder.push(piece);
        for (let next = decoder.next(); next; next = decoder.next()) decode(next);
        at += piece.length;
      }
    } catch (error) {
      if (!(error instanceof RepriseError) || !["bad_frame", "checksum"].includes(error.code)) throw error;
      tally.damaged++;
    }
  };
  try {
    for (let round = 0; round < 250_000; round++) {
      const frames = [0, 1, 2, 3].map(() => mutated(all[random(all.length)]!, random));
      tally.frames += frames.length;
      const bytes = Buffer.concat(frames);
      if (round % 2 === 1) bytes[random(bytes.length)]! ^= 1 << random(8);
      decodeStream(bytes);
      if (round === 25_000) before = residentNow();
    }
  } catch (error) {
    throw new Error(`REPRISE_FUZZ_SEED=${FUZZ_SEED} found it, after ${tally.frames} frames`, { cause: error });
  } finally {
    Error.stackTraceLimit = stackTraceLimit;
  }
  expect(tally.frames).toBe(1_000_000);
  // All three are met, and often: else nothing was tried.
  expect(Math.min(tally.decoded, tally.refused, tally.damaged)).toBeGreaterThan(100_000);
  expect(residentNow() - before).toBeLessThan(150e6);
});

function residentNow(): number {
  Bun.gc(true);
  return process.memoryUsage.rss();
}

/** What one connection says: requests that are understood, however odd, up to the first that is not. */
function conversation(all: Uint8Array[], random: (limit: number) => number): { bytes: Uint8Array; frames: number } {
  const frames: Uint8Array[] = [encodeHello()];
  for (let count = 0; count < 20; count++) {
    const next = mutated(all[random(all.length)]!, random);
    frames.push(next);
    const asked = requestIn(next);
    if (!asked || asked.action === "quit") break;
    if (asked.action !== "put" || asked.content) continue;
    for (let pieces = random(3); pieces > 0; pieces--) frames.push(data(randomBytes(1 + random(3000))));
    // Its END, often with another count than it should have, and sometimes something else.
    frames.push(random(8) === 0 ? mutated(all[random(all.length)]!, random) : encodeEnd(random(4)));
  }
  const bytes = Buffer.concat([...frames, quit]);
  const isFlipped = random(2) === 0;
  if (isFlipped) bytes[random(bytes.length)]! ^= 1 << random(8);
  return { bytes, frames: frames.length };
}

function requestIn(bytes: Uint8Array): Request | undefined {
  try {
    return decodeRequest({ type: bytes[4]!, payload: bytes.subarray(HEADER_BYTES), crc32: 0 });
  } catch {
    return undefined;
  }
}

test(
  `row 20: ${FUZZ_FRAMES.toLocaleString("en")} fuzzed frames to a real server: no crash, no bug, no growth`,
  async () => {
    const { it, workers, growth } = await measured({ args: ["--idle-timeout", "20"] });
    await using place = it;
    const outside = () => treeOf(place.outer).filter((line) => !line.startsWith("root"));
    const before = outside();
    const random = seeded(FUZZ_SEED);
    const all = samples();
    let sent = 0;
    let answered = 0;
    const lane = async () => {
      while (sent < FUZZ_FRAMES) {
        const { bytes, frames } = conversation(all, random);
        sent += frames;
        writeTree(place.root, { file: "inside" });
        // With its end: a length that was flipped leaves the server waiting for more.
        answered += decodeAll(await exchange(place.server.port, bytes, true)).length;
      }
    };
    try {
      await Promise.all(Array.from({ length: 16 }, lane));
      expect(outside()).toEqual(before);
      expect(await growth()).toBeLessThan(150e6);
      writeTree(place.root, { file: "inside" });
      await expectUnharmed(place, workers);
      // Else it was not the requests that were tried.
      expect(answered).toBeGreaterThan(FUZZ_FRAMES / 50);
    } catch (error) {
      throw new Error(`REPRISE_FUZZ_SEED=${FUZZ_SEED} found it, of ${sent} frames`, { cause: error });
    }
  },
  TEST_MS + FUZZ_FRAMES,
);

// ---------------------------------------------------------------------------------------------------- bounds

describe("bounds", () => {
  const floods: [string, number, Uint8Array, number][] = [
    ["STAT", 100_000, request({ action: "stat", path: "file" }), 1],
    ["GET", 100_000, get("file"), 3],
    ["LIST", 20_000, actions["list -r"]!(""), 2],
    ["PUT", 20_000, whole("new", "x"), 1],
  ];
  test.each(floods)("row 21: %s, %d at once and nothing read, costs a worker little", async (_, count, frame, each) => {
    const { it, workers, growth } = await measured();
    await using place = it;
    using reader = deafReader(place.server.port, ...Array.from({ length: count }, () => frame), quit);
    // What the kernel's buffers hold of answers has been made: the server has to wait for us now, or is done.
    let before = -1;
    await waitFor("no further request is taken", async () => {
      const same = place.server.log.length === before && before > 0;
      before = place.server.log.length;
      if (!same) await Bun.sleep(300);
      return same;
    });
    expect(await growth()).toBeLessThan(100e6);
    await expectUnharmed(place, workers);
    // Whoever does read has an answer to each.
    expect((await reader.readAll()).length).toBe(count * each + 1);
    expect(await growth()).toBeLessThan(150e6);
  });

  test("row 21: peers that send a byte now and then, or never read, are closed, and slow nobody", async () => {
    const { it, workers } = await measured({ args: ["--idle-timeout", "1.5"] });
    await using place = it;
    writeLargeFile(join(place.root, "big"), 16 << 20);
    const drippers: RawConnection[] = [];
    const slow = encodeRequest({ action: "stat", path: "x".repeat(3000) });
    let at = 0;
    const connectDrippers = async () => {
      at = 0;
      drippers.push(...(await Promise.all(Array.from({ length: 100 }, () => connectRaw(place.server.port)))));
      for (const { socket } of drippers.slice(-100)) socket.write(encodeHello());
    };
    await connectDrippers();
    const dripping = setInterval(() => {
      for (const { socket, closed } of drippers) if (!closed()) socket.write(slow.subarray(at, at + 1));
      at++;
    }, 50);
    const deaf = Array.from({ length: 100 }, () => deafReader(place.server.port, get("big")));
    let served = 0;
    // Where the machine is so slow that they are closed before, others take their place.
    for (; served <= 10 || !drippers.every((peer) => peer.closed()); served++) {
      if (drippers.every((peer) => peer.closed())) await connectDrippers();
      expect(await converse(place.server.port, get("file"))).toEqual(["meta file 6", "inside", "end", "end"]);
      await Bun.sleep(1);
    }
    clearInterval(dripping);
    const ended = () => place.server.log.filter(({ event, status }) => event === "get" && status === "timeout").length;
    await waitFor("the deaf are closed", () => ended() === deaf.length);
    await expectUnharmed(place, workers);
    for (const peer of [...deaf, ...drippers]) peer[Symbol.dispose]();
  });

  test("row 22: a flood of connections, and descriptors used up: a cap, no spinning, and served again after it", async () => {
    const { it, workers } = await measured({ runBy: ["sh", "-c", 'ulimit -n 1200; exec "$@"', "sh"] });
    await using place = it;
    const flood: RawConnection[] = [];
    for (let round = 0; round < 20; round++) {
      const tried = await Promise.allSettled(Array.from({ length: 100 }, () => connectRaw(place.server.port)));
      // Some are closed before they know that they were connected.
      flood.push(...tried.flatMap((one) => (one.status === "fulfilled" ? [one.value] : [])));
    }
    const isOpen = (peer: RawConnection) => !peer.closed();
    await waitFor("those beyond the cap are closed", () => flood.filter(isOpen).length < 1200);
    expect(flood.filter(isOpen).length).toBeGreaterThan(5);
    // All that stay are silent: nothing is to be done.
    const before = processorMs(workers[0]!);
    await Bun.sleep(1000);
    expect(processorMs(workers[0]!) - before).toBeLessThan(500);
    expect(readdirSync(`/proc/${workers[0]}/fd`).length).toBeLessThan(1200);
    for (const peer of flood) peer[Symbol.dispose]();
    await expectUnharmed(place, workers);
  });
});

/** Of a process so far, its own and the kernel's for it. */
function processorMs(pid: number): number {
  const fields = readFileSync(`/proc/${pid}/stat`, "utf8").split(") ").pop()!.split(" ");
  return (Number(fields[11]) + Number(fields[12])) * 10;
}

// ---------------------------------------------------------------------------------------------------- full disks

const canMount = isRoot && Bun.which("mount") !== null;
if (!canMount) console.log("skipped: the tests of a full disk mount a tmpfs, which needs root");

/** A tmpfs of 1 MiB; undefined where even root may not have one. */
function mountSmall(): ({ path: string; grow(): void } & Disposable) | undefined {
  const folder = temporaryFolder();
  const { exitCode } = Bun.spawnSync(["mount", "-t", "tmpfs", "-o", "size=1M", "none", folder.path]);
  if (exitCode === 0) {
    const unmount = () => Bun.spawnSync(["umount", "-l", folder.path]);
    const grow = () => void Bun.spawnSync(["mount", "-o", "remount,size=64M", folder.path]);
    return { path: folder.path, grow, [Symbol.dispose]: () => void (unmount() && folder[Symbol.dispose]()) };
  }
  console.log("skipped: this machine does not let root mount a tmpfs");
  folder[Symbol.dispose]();
  return undefined;
}

test.skipIf(!canMount)(
  "row 23: an endless upload ends in words, and leaves nothing, or what can be gone on with",
  async () => {
    using small = mountSmall();
    if (!small) return;
    const { it, workers } = await measured({ parent: small.path, args: ["--keep-free", "0"] });
    await using place = it;
    const staging = join(place.root, ".reprise");
    const staged = () => readdirSync(staging).filter((name) => !name.startsWith("lock"));
    const piece = data(randomBytes(MAX_REQUEST_BYTES));
    for (const id of ["", "a".repeat(32)]) {
      // 32 MiB of what would go on for ever, and the END that the protocol asks for after a refusal.
      const endless = Array.from({ length: 512 }, () => piece);
      const answers = await talk(
        place.server.port,
        put("endless", { id }),
        ...endless,
        encodeEnd(0),
        get("file"),
        quit,
      );
      expect(answers.map(brief)).toEqual(["no_room", "meta file 6", "inside", "end", "end"]);
      expect(answers[0]?.type === "error" && answers[0].error.message).toContain("make room there and put it again");
      await waitFor("it is let go", () => staged().filter((name) => !/^put-a+$/.test(name)).length === 0);
      expect(staged().length).toBe(id === "" ? 0 : 1);
    }
    expect(readdirSync(place.root)).not.toContain("endless");
    // Many small ones have no place to go either, and say so.
    const many = Array.from({ length: 50 }, (_, index) => whole(`small-${index}`, "x".repeat(50_000)));
    const refused = (await converse(place.server.port, ...many)).filter((line) => line === "no_room");
    expect(refused.length).toBeGreaterThan(40);
    small.grow();
    const id = "a".repeat(32);
    const [sum] = await talk(place.server.port, request({ action: "sums", id, path: "" }), quit);
    const held = sum?.type === "sum" ? sum.length : 0;
    expect(held).toBeGreaterThan(500_000);
    const goOn = [put("endless", { id, offset: held }), data(Buffer.from("the rest")), encodeEnd(8)];
    expect(await converse(place.server.port, ...goOn)).toEqual([`meta file ${held + 8}`, "end"]);
    await expectUnharmed(place, workers);
  },
);

test.skipIf(!canMount)(
  "row 23: a disk that is full in the middle of a download: status 7 in words, and gone on with",
  async () => {
    using small = mountSmall();
    if (!small) return;
    using root = makeRoot({ big: randomBytes(4_000_000), file: "inside" });
    await using server = await startServer(root.path);
    const fetch = () => runClient(server.address, ["get", "big", "-d", small.path]);
    const full = await fetch();
    expect({ status: full.status, lines: full.errors.trim().split("\n").length }).toEqual({ status: 7, lines: 1 });
    expect(existsSync(join(small.path, "big"))).toBe(false);
    expect((await runClient(server.address, ["cat", "file"])).output).toBe("inside");
    small.grow();
    expect((await fetch()).status).toBe(0);
    expect(readFileSync(join(small.path, "big")).equals(readFileSync(join(root.path, "big")))).toBe(true);
    expect(readdirSync(small.path)).toEqual(["big"]);
    await waitFor("what had come by then did not come again", () =>
      server.log.some(({ path, status, offset }) => path === "big" && status === "ok" && offset! > 0),
    );
  },
);

test("row 23: an upload that was refused is over: the server goes on with nothing of it", async () => {
  const { it, workers } = await measured();
  await using place = it;
  using raw = await connectRaw(place.server.port);
  raw.socket.write(Buffer.concat([encodeHello(), put("../x"), ...contentFrames(CONTENT)]));
  await waitFor("it is refused", () => decodeAll(raw.received()).length === 2);
  // For as long as another, whose upload goes on byte by byte, is told twice to wait.
  using slow = await connectRaw(place.server.port);
  slow.socket.write(Buffer.concat([encodeHello(), put("slow"), encodeDataHeader(1000, 0)]));
  const dripping = setInterval(() => slow.socket.write("x"), 100);
  const waits = () => decodeAll(slow.received()).filter(({ type }) => type === "wait").length;
  await waitFor("the other is told to wait", () => waits() >= 2).finally(() => clearInterval(dripping));
  raw.socket.write(Buffer.concat([request({ action: "stat", path: "file" }), quit]));
  await waitFor("the server has closed", () => raw.closed());
  expect(decodeAll(raw.received()).slice(1).map(brief)).toEqual(["bad_name", "meta file 6", "end"]);
  await expectUnharmed(place, workers);
});

// ---------------------------------------------------------------------------------------------------- redirects

/** A server that answers every HELLO, and whatever comes behind it, as the test wants. */
function startSayer(say: () => Uint8Array[]): { port: number; address: string; connections: number } & Disposable {
  const sayer = { port: 0, address: "", connections: 0 };
  const listener = Bun.listen({
    hostname: "127.0.0.1",
    port: 0,
    socket: {
      open: () => void sayer.connections++,
      data: (socket) => void socket.write(Buffer.concat(say())),
      error() {},
    },
  });
  sayer.port = listener.port;
  sayer.address = `127.0.0.1:${listener.port}`;
  return Object.assign(sayer, { [Symbol.dispose]: () => listener.stop(true) });
}

describe("row 25: redirects to the client", () => {
  const run = (address: string, ...args: string[]) =>
    runClient(address, [...args, "--retries", "0", "--timeout", "20"]);

  test("row 25: a redirect is followed, and the file is the one that is there", async () => {
    using root = makeRoot({ file: "inside" });
    await using server = await startServer(root.path);
    using sayer = startSayer(() => [encodeRedirect("127.0.0.1", server.port)]);
    expect(await run(sayer.address, "cat", "file")).toMatchObject({ status: 0, output: "inside" });
  });

  test("row 25: at most five redirects, and none in a circle", async () => {
    using root = makeRoot({ file: "inside" });
    await using server = await startServer(root.path);
    for (const [length, status] of [
      [5, 0],
      [6, 9],
    ] as const) {
      let next = server.port;
      const chain = Array.from({ length }, () => {
        const to = next;
        const sayer = startSayer(() => [encodeRedirect("127.0.0.1", to)]);
        next = sayer.port;
        return sayer;
      });
      const ran = await run(`127.0.0.1:${next}`, "cat", "file");
      expect([length, ran.status, ran.output]).toEqual([length, status, status === 0 ? "inside" : ""]);
      for (const sayer of chain) sayer[Symbol.dispose]();
    }
    using self = startSayer(() => [encodeRedirect("127.0.0.1", self.port)]);
    const ran = await run(self.address, "cat", "file");
    expect({ status: ran.status, errors: ran.errors }).toEqual({
      status: 9,
      errors: expect.stringContaining("circle"),
    });
    expect(self.connections).toBeLessThan(4);
  });

  test.each(["", "a b", "\x1b[31m", "host\nname", "a/b", "user@host", "é"])(
    "row 25: a redirect to %j is no address",
    async (host) => {
      using sayer = startSayer(() => [encodeRedirect(host, 1)]);
      const ran = await run(sayer.address, "cat", "file");
      expect({ status: ran.status, lines: ran.errors.trim().split("\n").length }).toEqual({ status: 9, lines: 1 });
      expectTame(ran.errors, host);
    },
  );

  const meta = encodeMeta({ kind: "file", size: 9, mtime: 0, etag: "e" });
  const forged: [string, (to: number) => Uint8Array[]][] = [
    ["behind META", (to) => [meta, encodeRedirect("127.0.0.1", to)]],
    ["in the middle of the content", (to) => [meta, data(Buffer.from("good")), encodeRedirect("127.0.0.1", to)]],
    ["in place of END", (to) => [meta, data(Buffer.from("all of it")), encodeRedirect("127.0.0.1", to)]],
  ];
  test.each(forged)("row 25: a forged REDIRECT behind WELCOME is not followed (%s)", async (_, answer) => {
    using trap = startSayer(() => [encodeWelcome("trap"), meta, data(Buffer.from("forgeries")), encodeEnd(9)]);
    using server = startFakeServer(() => answer(trap.port));
    using folder = temporaryFolder();
    for (const args of [
      ["get", "f", "-d", folder.path],
      ["cat", "f"],
    ]) {
      const ran = await run(server.address, ...args);
      expect(ran.status).toBeGreaterThan(2);
      expect(ran.output).not.toContain("forger");
    }
    expect(trap.connections).toBe(0);
    expect(existsSync(join(folder.path, "f"))).toBe(false);
  });
});
