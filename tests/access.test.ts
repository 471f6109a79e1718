/** Who may do what: tokens, one refusal for all, what the client does with its token, counts, slow peers, the log. */
import { afterAll, describe, expect, setDefaultTimeout, test } from "bun:test";
import {
  chmodSync,
  existsSync,
  mkdirSync,
  readdirSync,
  readFileSync,
  renameSync,
  rmSync,
  statSync,
  symlinkSync,
  unlinkSync,
  writeFileSync,
} from "node:fs";
import { connect, type Socket } from "node:net";
import { join } from "node:path";
import { Admission, type AdmissionLimits, Gate, type Question, type Reply } from "../admission.ts";
import {
  type Answer,
  decodeAnswer,
  encodeDataHeader,
  encodeEnd,
  encodeHello,
  encodeRedirect,
  encodeRequest,
  FrameDecoder,
  MAX_ANSWER_BYTES,
  MAX_HELLO_BYTES,
  MAX_REQUEST_BYTES,
  MAX_WHOLE_BYTES,
  type Put,
  RepriseError,
  type Request,
  TO_THE_END,
} from "../protocol.ts";
import { type Access, addToken, readTokens, removeToken, Tokens } from "../tokens.ts";
import { startProxy } from "./faults/proxy.ts";
import {
  connectRaw,
  HOME,
  isAlive,
  killHard,
  type LogLine,
  makeRoot,
  randomBytes,
  runClient,
  type Server,
  type ServerOptions,
  sizeOf,
  spawnClient,
  startServer,
  TEST_MS,
  temporaryFolder,
  treeOf,
  waitFor,
  writeLargeFile,
} from "./fixtures.ts";

setDefaultTimeout(TEST_MS);

// ---------------------------------------------------------------------------------------------------- token command

interface Run {
  status: number;
  output: string;
  errors: string;
}

/** `bun server.ts token …`, or by `runBy`. */
async function tokenCommand(args: string[], options: { cwd?: string; runBy?: string[] } = {}): Promise<Run> {
  const child = Bun.spawn({
    cmd: [...(options.runBy ?? []), process.execPath, join(HOME, "server.ts"), "token", ...args],
    cwd: options.cwd ?? HOME,
    stdio: ["ignore", "pipe", "pipe"],
  });
  const [output, errors, status] = await Promise.all([
    new Response(child.stdout).text(),
    new Response(child.stderr).text(),
    child.exited,
  ]);
  return { status, output, errors };
}

/** A file of tokens in a folder of its own. */
function tokenFile(): { path: string; folder: string } & Disposable {
  const folder = temporaryFolder();
  return {
    path: join(folder.path, "tokens.json"),
    folder: folder.path,
    [Symbol.dispose]: () => folder[Symbol.dispose](),
  };
}

const modeOf = (path: string) => statSync(path).mode & 0o777;
const hashOf = (text: string) => new Bun.CryptoHasher("sha256").update(text).digest("hex");

/** An entry as it stands in the file. */
const entry = (name: string, more: object = {}) => ({
  name,
  access: "read",
  folder: "",
  sha256: hashOf(name),
  created: "2026-01-01T00:00:00.000Z",
  ...more,
});

describe("server.ts token", () => {
  test("add prints the token, once, on stdout alone; the file has its hash and nobody else may read it", async () => {
    using file = tokenFile();
    const args = ["add", "ann", "--access", "write", "--folder", "photos/", "--expires", "30d", "--tokens", file.path];
    const before = Date.now();
    const { status, output, errors } = await tokenCommand(args);
    expect(status).toBe(0);
    expect(output).toMatch(/^rprs_[\w-]{43}\n$/);
    const text = output.trim();
    expect(errors).not.toContain(text.slice(5));
    expect(errors.trim().split("\n").length).toBe(1);
    const written = readFileSync(file.path, "utf8");
    expect(written).not.toContain(text.slice(5));
    expect(modeOf(file.path)).toBe(0o600);
    const { tokens } = JSON.parse(written);
    expect(tokens).toEqual([
      {
        name: "ann",
        access: "write",
        folder: "photos",
        sha256: hashOf(text),
        created: expect.any(String),
        expires: expect.any(String),
      },
    ]);
    const lives = Date.parse(tokens[0].expires) - before;
    expect(lives).toBeGreaterThanOrEqual(30 * 86_400_000);
    expect(lives).toBeLessThan(30 * 86_400_000 + TEST_MS);
    expect(readdirSync(file.folder)).toEqual(["tokens.json"]);
  });

  test("each has another token; list and remove; tokens.json in the working folder is the default", async () => {
    using file = tokenFile();
    const at = { cwd: file.folder };
    const ann = await tokenCommand(["add", "ann", "--access", "read"], at);
    const ben = await tokenCommand(["add", "ben@example.org", "--access=replica", "--expires", "1h"], at);
    expect(new Set([ann.output, ben.output]).size).toBe(2);
    const listed = await tokenCommand(["list"], at);
    expect(listed).toMatchObject({ status: 0, errors: "" });
    expect(listed.output).toMatch(
      /^ann +read +"\/"\nben@example\.org +replica "\/" {2}until \d{4}-\d\d-\d\dT\d\d:\d\dZ\n$/,
    );
    const objects = (await tokenCommand(["list", "--json"], at)).output.trim().split("\n");
    expect(objects.map((line) => Object.keys(JSON.parse(line)))).toEqual([
      ["name", "access", "folder", "created"],
      ["name", "access", "folder", "created", "expires"],
    ]);
    for (const { output } of [ann, ben]) expect(listed.output + objects).not.toContain(hashOf(output.trim()));
    expect(await tokenCommand(["remove", "ann"], at)).toMatchObject({ status: 0, output: "" });
    expect(readTokens(file.path).map(({ name }) => name)).toEqual(["ben@example.org"]);
    expect(modeOf(file.path)).toBe(0o600);
  });

  test("list says what has expired, and an empty file has no tokens", async () => {
    using file = tokenFile();
    writeFileSync(file.path, JSON.stringify({ tokens: [entry("old", { expires: "2020-01-01T00:00:00Z" })] }));
    expect((await tokenCommand(["list", "--tokens", file.path])).output).toContain("expired 2020-01-01T00:00Z");
    writeFileSync(file.path, "");
    expect(await tokenCommand(["list", "--tokens", file.path])).toEqual({ status: 0, output: "", errors: "" });
  });

  const wrong: [string[], number, string][] = [
    [[], 2, "token needs one of add, list, remove"],
    [["ad"], 2, 'unknown command "ad", did you mean add?'],
    [["add"], 2, "needs NAME"],
    [["add", "ann"], 2, "--access takes read, write, replica"],
    [["add", "ann", "--access", "admin"], 2, '--access takes read, write, replica, not "admin"'],
    [["add", "ann", "--access"], 2, "--access needs a value"],
    [["add", "ann", "ben", "--access", "read"], 2, 'does not take "ben"'],
    [["add", "a b", "--access", "read"], 2, '"a b" is no name'],
    [["add", "a\u202e\x1b[1m", "--access", "read"], 2, '"a\\u202e\\u001b[1m" is no name'],
    [["add", "a".repeat(65), "--access", "read"], 2, "is no name"],
    [["add", "", "--access", "read"], 2, "is no name"],
    [["add", "ann", "--access", "read", "--expires", "30"], 2, "--expires takes a time such as 90m, 12h, 30d or 2w"],
    [["add", "ann", "--access", "read", "--expires", "0d"], 2, "--expires takes"],
    [["add", "ann", "--access", "read", "--expires", "-1d"], 2, "--expires"],
    [["add", "ann", "--access", "read", "--folder", "../x"], 4, "is not a name below the served folder"],
    [["add", "ann", "--access", "read", "--folder", "/etc"], 4, "is not a name below the served folder"],
    [["add", "ann", "--access", "read", "--folder", "a//b"], 4, "is not a name below the served folder"],
    [["add", "ann", "--access", "read", "--folder", ".reprise"], 2, '".reprise" is never served'],
    [["add", "ann", "--access", "read", "--folder", "a/.reprise-1"], 2, "is never served"],
    [["add", "known", "--access", "read"], 4, 'there is a token "known"'],
    [["remove"], 2, "needs NAME"],
    [["remove", "nobody"], 3, 'there is no token "nobody"'],
    [["list", "--jsn"], 2, "did you mean --json?"],
    [["list", "x"], 2, 'does not take "x"'],
  ];
  test.each(wrong)("%j gives status %d and says why; the file stays as it is", async (args, status, text) => {
    using file = tokenFile();
    addToken(file.path, { name: "known", access: "read", folder: "" });
    const before = readFileSync(file.path, "utf8");
    const run = await tokenCommand(args, { cwd: file.folder });
    expect(run).toMatchObject({ status, output: "" });
    expect(run.errors).toContain(text);
    expect(run.errors.trim().split("\n").length).toBe(1);
    expect(readFileSync(file.path, "utf8")).toBe(before);
    expect(readdirSync(file.folder)).toEqual(["tokens.json"]);
  });

  const noTokens: [string, string | undefined][] = [
    ["text", "-----BEGIN PRIVATE KEY-----"],
    ["null", "null"],
    ["another object", "{}"],
    ["tokens that are no list", '{"tokens": 1}'],
    ["null for an entry", '{"tokens": [null]}'],
    ["an entry without its name", JSON.stringify({ tokens: [{ ...entry("ann"), name: undefined }] })],
    ["an entry without its hash", JSON.stringify({ tokens: [entry("ann", { sha256: undefined })] })],
    ["a hash that is cut", JSON.stringify({ tokens: [entry("ann", { sha256: "abcd" })] })],
    ["an unknown access", JSON.stringify({ tokens: [entry("ann", { access: "root" })] })],
    ["no folder", JSON.stringify({ tokens: [entry("ann", { folder: undefined })] })],
    ["an expiry that is none", JSON.stringify({ tokens: [entry("ann", { expires: "soon" })] })],
    [
      "an expiry by another name",
      JSON.stringify({ tokens: [entry("ann", { expired: "2020-01-01T00:00:00Z" } as object)] }),
    ],
    ["an expiry that is a number", JSON.stringify({ tokens: [entry("ann", { expires: 2030 })] })],
    ["a name that no terminal should be shown", JSON.stringify({ tokens: [entry("\x1b[1mann")] })],
    ["nothing where the file is not there", undefined],
  ];
  test.each(noTokens)("a file of %s is no file of tokens: said, and left alone", async (_, content) => {
    using file = tokenFile();
    if (content !== undefined) writeFileSync(file.path, content);
    const [status, text] = content === undefined ? [7, "cannot be read: ENOENT"] : [2, "is no file of tokens"];
    const runs = [["list"], ["remove", "ann"], ...(content === undefined ? [] : [["add", "ann", "--access", "read"]])];
    for (const args of runs) {
      const run = await tokenCommand([...args, "--tokens", file.path]);
      expect(run).toMatchObject({ status, output: "" });
      expect(run.errors).toContain(text);
      expect(run.errors.trim().split("\n").length).toBe(1);
    }
    const root = join(HOME, "server_root");
    await expect(startServer(root, { args: ["--tokens", file.path] })).rejects.toThrow(text);
    expect(readdirSync(file.folder)).toEqual(content === undefined ? [] : ["tokens.json"]);
    if (content !== undefined) expect(readFileSync(file.path, "utf8")).toBe(content);
  });

  test("twenty at a time: each is in the file, or says who holds it", async () => {
    using file = tokenFile();
    const names = Array.from({ length: 20 }, (_, index) => `guest${index}`);
    const adding = names.map((name) => tokenCommand(["add", name, "--access", "read", "--tokens", file.path]));
    const runs = await Promise.all(adding);
    const made = names.filter((_, index) => runs[index]!.status === 0);
    expect(made.length).toBeGreaterThan(0);
    for (const run of runs.filter(({ status }) => status !== 0)) {
      expect(run).toMatchObject({ status: 7, output: "" });
      expect(run.errors).toMatch(/is held by (process \d+|another process)/);
    }
    const known = new Tokens(readTokens(file.path));
    const found = runs.flatMap(({ output }) => (output === "" ? [] : [known.find(output.trim())?.name]));
    expect(found).toEqual(made);
    expect(
      readTokens(file.path)
        .map(({ name }) => name)
        .sort(),
    ).toEqual(made.sort());
    expect(readdirSync(file.folder)).toEqual(["tokens.json"]);
  });

  test("killed at any moment it leaves the old file or the new one, and the next goes on", async () => {
    using file = tokenFile();
    addToken(file.path, { name: "first", access: "read", folder: "" });
    const before = readFileSync(file.path, "utf8");
    for (let ms = 0; ms < 10; ms++) {
      const child = Bun.spawn({
        cmd: [
          process.execPath,
          join(HOME, "server.ts"),
          "token",
          "add",
          `n${ms}`,
          "--access",
          "read",
          "--tokens",
          file.path,
        ],
        stdio: ["ignore", "ignore", "ignore"],
      });
      // Near the end of it, where the file is written, wherever the machine's pace puts that.
      await Promise.race([
        waitFor("it writes", () => existsSync(`${file.path}.new`)),
        child.exited,
        Bun.sleep(ms * 15),
      ]);
      child.kill("SIGKILL");
      await child.exited;
      expect(readTokens(file.path)[0]).toEqual(JSON.parse(before).tokens[0]);
    }
    expect(await tokenCommand(["add", "last", "--access", "read", "--tokens", file.path])).toMatchObject({ status: 0 });
    expect(readTokens(file.path).at(-1)!.name).toBe("last");
    expect(readdirSync(file.folder)).toEqual(["tokens.json"]);
  });

  test("what a killed one left, or somebody laid out, gives the new file neither its mode nor its place", async () => {
    using file = tokenFile();
    writeFileSync(`${file.path}.new`, "left", { mode: 0o666 });
    chmodSync(`${file.path}.new`, 0o666);
    addToken(file.path, { name: "ann", access: "read", folder: "" });
    expect(modeOf(file.path)).toBe(0o600);
    const elsewhere = join(file.folder, "elsewhere");
    writeFileSync(elsewhere, "mine");
    symlinkSync(elsewhere, `${file.path}.new`);
    addToken(file.path, { name: "ben", access: "read", folder: "" });
    expect(readFileSync(elsewhere, "utf8")).toBe("mine");
    expect(readTokens(file.path).length).toBe(2);
  });

  test("a file that cannot be written whole stays as it was", async () => {
    using file = tokenFile();
    for (let index = 0; index < 10; index++) addToken(file.path, { name: `n${index}`, access: "read", folder: "" });
    const before = readFileSync(file.path, "utf8");
    expect(before.length).toBeGreaterThan(1024);
    // Blocks of 1024 bytes: the first write comes short, the next one fails.
    const runBy = ["bash", "-c", 'ulimit -f 1; trap "" XFSZ; exec "$@"', "bash"];
    const run = await tokenCommand(["add", "one-more", "--access", "read", "--tokens", file.path], { runBy });
    expect(readFileSync(file.path, "utf8")).toBe(before);
    expect(run).toMatchObject({ status: 7, output: "" });
    expect(run.errors).toContain("cannot be changed: EFBIG");
    expect(readdirSync(file.folder)).toEqual(["tokens.json"]);
  });

  test("a folder called token is served as ./token", async () => {
    using home = makeRoot({ "token/a": "1" });
    await using server = await startServer("./token", { cwd: home.path });
    expect((await runClient(server.address, ["cat", "a"])).output).toBe("1");
    expect(await tokenCommand([], { cwd: home.path })).toMatchObject({ status: 2, output: "" });
  });
});

// ---------------------------------------------------------------------------------------------------- guests

/** A connection as a guest has it, from an address of its own unless it is given one: refusals make an address wait. */
interface Guest extends Disposable {
  socket: Socket;
  address: string;
  /** All that came, decoded. */
  answers(): Answer[];
  /** The same as bytes. */
  received(): Buffer;
  closed(): boolean;
  /** Sends a request and gives `ok` or the code of the error. */
  ask(request: Request): Promise<string>;
}

let guests = 0;
const ownAddress = () => `127.77.${(++guests >> 8) & 255}.${guests & 255}`;
const ENDS = ["end", "error", "file", "info"];

async function visit(port: number, address = ownAddress()): Promise<Guest> {
  const chunks: Buffer[] = [];
  const answers: Answer[] = [];
  const decoder = new FrameDecoder({ maxLength: MAX_ANSWER_BYTES });
  let isClosed = false;
  const socket = connect({ host: "127.0.0.1", port, localAddress: address });
  socket.on("data", (bytes: Buffer) => {
    chunks.push(bytes);
    decoder.push(new Uint8Array(bytes));
    for (let frame = decoder.next(); frame; frame = decoder.next()) {
      const answer = decodeAnswer(frame);
      if (answer.type !== "wait") answers.push(answer);
    }
  });
  socket.on("error", () => {});
  socket.on("close", () => {
    isClosed = true;
  });
  await waitFor("the guest is connected", () => !socket.connecting || isClosed);
  return {
    socket,
    address,
    answers: () => answers,
    received: () => Buffer.concat(chunks),
    closed: () => isClosed,
    async ask(request) {
      const from = answers.length;
      const ends = request.action === "stat" || request.action === "put" ? ["meta", ...ENDS] : ENDS;
      socket.write(encodeRequest(request));
      const last = await waitFor(`the answer to ${request.action}`, () =>
        isClosed ? ("closed" as const) : answers.slice(from).find(({ type }) => ends.includes(type)),
      );
      if (last === "closed") return codeOf(answers.at(-1));
      return codeOf(last);
    },
    [Symbol.dispose]: () => void socket.destroy(),
  };
}

const codeOf = (answer: Answer | undefined) => (answer?.type === "error" ? answer.error.code : "ok");

/** A guest that has said who it is; throws the error that it got. */
async function enter(port: number, token = "", address?: string): Promise<Guest> {
  const guest = await visit(port, address);
  guest.socket.write(encodeHello({ token }));
  const answer = await waitFor(
    "a welcome or an error",
    () => guest.answers()[0] ?? (guest.closed() ? ("closed" as const) : undefined),
  );
  if (answer === "closed") throw new RepriseError("lost");
  if (answer.type === "error") throw answer.error;
  return guest;
}

const get = (path: string): Request => ({ action: "get", path, offset: 0, length: TO_THE_END, etag: "" });
const list = (path: string): Request => ({ action: "list", path, recursive: true });
const stat = (path: string): Request => ({ action: "stat", path });
const sums = (path: string, id = ""): Request => ({ action: "sums", id, path });
const remove = (path: string): Request => ({ action: "remove", path, recursive: true });
const move = (path: string, to: string): Request => ({ action: "move", path, to, overwrite: true });
const mkdir = (path: string): Request => ({ action: "mkdir", path, parents: true });
const UPLOAD_ID = "0123456789abcdef0123456789abcdef";
const put = (path: string, more: Partial<Put> = {}): Put => ({
  action: "put",
  path,
  id: "",
  offset: 0,
  size: 3,
  mtime: 0,
  noClobber: false,
  parents: true,
  etag: "",
  content: Buffer.from("new"),
  ...more,
});

const READING: Record<string, Request> = {
  get: get("f"),
  list: list(""),
  stat: stat("f"),
  sums: sums("f"),
  status: { action: "status" },
};
const WRITING: Record<string, Request> = {
  "sums of an upload": sums("", UPLOAD_ID),
  put: put("p"),
  move: move("m", "n"),
  mkdir: mkdir("d/e"),
  remove: remove("r"),
};
const TREE = { f: "content", m: "moved", "r/x": "removed" };

/** Tokens by name: what each may do, its folder, its expiry. */
type Grants = Record<string, [access: Access, folder?: string, expires?: string]>;

/** A writable server with tokens, by their names, and the file that they are in. */
interface Guarded<Names extends string> extends AsyncDisposable {
  server: Server;
  port: number;
  file: string;
  tokens: Record<Names, string>;
  /** SIGHUP; returns when the supervisor has taken it. */
  reload(): Promise<void>;
  /** What was logged of a guest. */
  logOf(guest: Guest): LogLine[];
}

async function guard<G extends Grants>(root: string, grants: G, options: ServerOptions = {}) {
  const file = tokenFile();
  addToken(file.path, { name: "nobody", access: "read", folder: "" });
  const made = Object.entries(grants).map(([name, [access, folder = "", expires]]) => [
    name,
    addToken(file.path, { name, access, folder, ...(expires && { expires }) }),
  ]);
  const args = ["--tokens", file.path, "--writable", ...(options.args ?? [])];
  const server = await startServer(root, { ...options, args });
  const reloads = () => server.log.filter(({ event }) => event === "reload").length;
  const guarded: Guarded<keyof G & string> = {
    server,
    port: server.port,
    file: file.path,
    tokens: Object.fromEntries(made),
    async reload() {
      const before = reloads();
      server.process.kill("SIGHUP");
      await waitFor("the tokens are read again", () => reloads() > before);
    },
    logOf: (guest) => server.log.filter(({ peer }) => peer === guest.address),
    async [Symbol.asyncDispose]() {
      await server[Symbol.asyncDispose]();
      file[Symbol.dispose]();
    },
  };
  return guarded;
}

const PAST = "2020-01-01T00:00:00.000Z";

describe("access", () => {
  const may: [Access, string, string][] = [
    ["write", "ok", "ok"],
    ["read", "ok", "denied"],
    ["replica", "ok", "denied"],
  ];
  test.each(may)("%s: reading is %s, writing is %s", async (access, reading, writing) => {
    using root = makeRoot(TREE);
    await using it = await guard(root.path, { ann: [access] });
    const before = treeOf(root.path);
    for (const [what, request] of [...Object.entries(READING), ...Object.entries(WRITING)]) {
      using guest = await enter(it.port, it.tokens.ann);
      const expected = what in READING ? reading : writing;
      expect({ what, code: await guest.ask(request) }).toEqual({ what, code: expected });
      if (expected === "denied") await waitFor("the connection ends with it", () => guest.closed());
    }
    if (writing === "denied") return expect(treeOf(root.path)).toEqual(before);
    expect(readdirSync(root.path).sort()).toEqual([".reprise", "d", "f", "n", "p"]);
  });

  test("write, where the server is read-only: refused, and the connection goes on", async () => {
    using root = makeRoot(TREE);
    await using it = await guard(root.path, { ann: ["write"], ben: ["read"] }, { args: ["--no-writable"] });
    using ann = await enter(it.port, it.tokens.ann);
    for (const request of Object.values(WRITING)) expect(await ann.ask(request)).toBe("read_only");
    expect(await ann.ask(stat("f"))).toBe("ok");
    using ben = await enter(it.port, it.tokens.ben);
    expect(await ben.ask(put("p"))).toBe("denied");
  });

  const outside: [string, (it: Guarded<"ann" | "old">) => string][] = [
    ["an expired", ({ tokens }) => tokens.old],
    ["an unknown", () => `rprs_${"x".repeat(43)}`],
    ["no", () => ""],
    ["the hash of a", ({ tokens }) => hashOf(tokens.ann)],
    ["the beginning of a", ({ tokens }) => tokens.ann.slice(0, -1)],
    ["the name of a", () => "ann"],
  ];
  test.each(outside)("%s token: no request behind it is looked at", async (kind, tokenOf) => {
    using root = makeRoot(TREE);
    await using it = await guard(root.path, { ann: ["write"], old: ["write", "", PAST] });
    const before = treeOf(root.path);
    using guest = await visit(it.port);
    const requests = [...Object.values(READING), ...Object.values(WRITING)].map(encodeRequest);
    guest.socket.write(Buffer.concat([encodeHello({ token: tokenOf(it) }), ...requests]));
    await waitFor("it is closed", () => guest.closed());
    expect(guest.answers().map(codeOf)).toEqual(["denied"]);
    expect(treeOf(root.path)).toEqual(before);
    await waitFor("it is logged", () => it.logOf(guest).length > 0);
    const why = { "an expired": "the token has expired", no: "no token" }[kind] ?? "no such token";
    expect(it.logOf(guest).map(({ event, status, why }) => [event, status, why])).toEqual([["close", "denied", why]]);
  });

  test("an empty file lets nobody in", async () => {
    using root = makeRoot(TREE);
    using file = tokenFile();
    writeFileSync(file.path, "");
    await using server = await startServer(root.path, { args: ["--tokens", file.path] });
    for (const token of ["", "x"]) await expect(enter(server.port, token)).rejects.toThrow("access denied");
  });

  test("a token that is removed, changed or runs out while its holder is connected ends with the next request", async () => {
    using root = makeRoot(TREE);
    const grants: Grants = { stays: ["read"], goes: ["read"], shrinks: ["write"], ends: ["read"] };
    await using it = await guard(root.path, grants, { args: ["--workers", "1"] });
    const { stays, goes, shrinks, ends } = it.tokens as Record<string, string>;
    using kept = await enter(it.port, stays);
    using cut = await enter(it.port, goes);
    using less = await enter(it.port, shrinks);
    using late = await enter(it.port, ends);
    for (const guest of [kept, cut, less, late]) expect(await guest.ask(stat("f"))).toBe("ok");
    removeToken(it.file, "goes");
    const file = JSON.parse(readFileSync(it.file, "utf8"));
    for (const token of file.tokens) {
      if (token.name === "shrinks") token.access = "read";
      if (token.name === "ends") token.expires = new Date().toISOString();
    }
    writeFileSync(it.file, JSON.stringify(file));
    await it.reload();
    for (const guest of [cut, less, late])
      await waitFor("it is denied", async () => (await guest.ask(stat("f"))) === "denied");
    expect(await kept.ask(stat("f"))).toBe("ok");
    await waitFor("each is logged", () => [cut, less, late].every((guest) => it.logOf(guest).at(-1)?.why));
    const gone = "the token was removed or changed";
    expect([cut, less, late].map((guest) => it.logOf(guest).at(-1)!.why)).toEqual([gone, gone, gone]);
    await expect(enter(it.port, goes)).rejects.toThrow("access denied");
    using again = await enter(it.port, shrinks);
    expect(await again.ask(put("p"))).toBe("denied");
  });

  test("SIGHUP lets a new token in, and keeps what was read before where the file is none", async () => {
    using root = makeRoot(TREE);
    await using it = await guard(root.path, { ann: ["read"] });
    const added = addToken(it.file, { name: "ben", access: "read", folder: "" });
    await expect(enter(it.port, added)).rejects.toThrow("access denied");
    await it.reload();
    using _ben = await waitFor("he gets in", () => enter(it.port, added).catch(() => undefined));
    writeFileSync(it.file, "{");
    it.server.process.kill("SIGHUP");
    await waitFor("it is said", () => it.server.stderr().includes("what was read before stays in use"));
    using ann = await enter(it.port, it.tokens.ann);
    expect(await ann.ask(stat("f"))).toBe("ok");
  });
});

// ---------------------------------------------------------------------------------------------------- folders

/** `mine` is what the guest sees; nothing of the rest may show. */
const SECRET = "what is outside";
function makeShared(): { path: string } & Disposable {
  const root = makeRoot({ "mine/a": "inside", "mine/sub/b": "inside too", "other/s": SECRET, s: SECRET });
  symlinkSync("../other", join(root.path, "mine/link"));
  symlinkSync(join(root.path, "other"), join(root.path, "mine/absolute"));
  symlinkSync("../other/s", join(root.path, "mine/file"));
  symlinkSync("..", join(root.path, "mine/sub/up"));
  return root;
}

const ESCAPES = [
  ..."s other/s mine/a ../s ../other/s sub/../../s ../mine/a /s /etc/passwd ./a . .. link/s absolute/s file".split(" "),
  ..."sub/up/a sub/up/link/s .reprise .reprise/lock mine other link/../a a/../../s //s %2e%2e/s ..\\s".split(" "),
];

describe("a token for a folder", () => {
  test("reads that folder as the root, and nothing outside it", async () => {
    using root = makeShared();
    await using it = await guard(root.path, { ann: ["read", "mine"] });
    using guest = await enter(it.port, it.tokens.ann);
    expect(await guest.ask(list(""))).toBe("ok");
    const entries = guest.answers().flatMap((answer) => (answer.type === "entries" ? answer.entries : []));
    expect(entries.map(({ path }) => path).sort()).toEqual(["a", "sub", "sub/b"]);
    for (const request of [get("a"), stat("sub/b"), sums("a"), list("sub"), stat("")])
      expect(await guest.ask(request)).toBe("ok");
    for (const path of ESCAPES) {
      for (const request of [get(path), stat(path), sums(path), list(path), { ...get(path), offset: 1 }]) {
        const code = await guest.ask(request);
        expect({ path, request, code }).toEqual({
          path,
          request,
          code: expect.stringMatching(/^(not_|bad_name|refused)/),
        });
      }
    }
    expect(guest.received().includes("inside")).toBe(true);
    expect(guest.received().includes(SECRET)).toBe(false);
    expect(guest.received().includes(root.path)).toBe(false);
  });

  test("changes what is in it, and nothing outside", async () => {
    using root = makeShared();
    await using it = await guard(root.path, { ann: ["write", "mine"] });
    using guest = await enter(it.port, it.tokens.ann);
    const rest = () => treeOf(root.path).filter((line) => !line.startsWith("mine/"));
    const before = rest();
    for (const path of [
      "",
      ...ESCAPES.filter((path) => !/^(s|other|mine|other\/s|mine\/a|%2e%2e\/s|\.\.\\s)$/.test(path)),
    ]) {
      for (const request of [
        put(path),
        put(path, { parents: false }),
        put(path, { id: UPLOAD_ID, content: undefined, size: 1e6 }),
        remove(path),
        move("a", path),
        move(path, "taken"),
        { ...mkdir(path), parents: false } as Request,
      ]) {
        const asked = request.action === "put" && !request.content;
        const code = await guest.ask(request);
        if (asked) guest.socket.write(encodeEnd(0));
        expect({ path, request, code }).toEqual({
          path,
          request,
          code: expect.stringMatching(/^(not_|bad_name|refused|exists)/),
        });
      }
    }
    expect(rest()).toEqual(before);
    expect(readFileSync(join(root.path, "mine/a"), "utf8")).toBe("inside");
    // These are names like any other within the folder, and mean nothing outside it.
    for (const path of ["s", "other/s", "mine/a", "%2e%2e/s", "..\\s"]) expect(await guest.ask(put(path))).toBe("ok");
    for (const request of [mkdir("x/y"), move("s", "x/y/s"), move("x", "z"), remove("sub"), remove("other")])
      expect(await guest.ask(request)).toBe("ok");
    expect(rest()).toEqual(before);
    const mine = treeOf(join(root.path, "mine")).map((line) => line.split(" ").slice(0, 2).join(" "));
    const links = ["absolute other", "file other", "link other"];
    const made = [
      "mine folder",
      "mine/a file",
      "z folder",
      "z/y folder",
      "z/y/s file",
      "%2e%2e folder",
      "%2e%2e/s file",
    ];
    expect(mine.sort()).toEqual(["a file", "..\\s file", ...links, ...made].sort());
    expect(guest.received().includes(root.path)).toBe(false);
  });

  test("client and server: put, put -r, get, sync up and down, two guests apart", async () => {
    using root = makeRoot({ "ann/": "", "guests/ben/": "" });
    using local = makeRoot({ "src/x": "1", "src/deep/y": "2", f: "of ann", g: "of ben" });
    await using it = await guard(root.path, { ann: ["write", "ann"], ben: ["write", "guests/ben"] });
    const as = (who: "ann" | "ben", ...args: string[]) =>
      runClient(it.server.address, args, { cwd: local.path, env: { REPRISE_TOKEN: it.tokens[who] } });
    expect(await as("ann", "put", "f", "-t", "f")).toMatchObject({ status: 0 });
    expect(await as("ben", "put", "g", "-t", "f")).toMatchObject({ status: 0 });
    expect((await as("ann", "cat", "f")).output).toBe("of ann");
    expect((await as("ben", "cat", "f")).output).toBe("of ben");
    expect(await as("ann", "put", "-r", "src")).toMatchObject({ status: 0 });
    expect(await as("ben", "sync", "--up", "", "src")).toMatchObject({ status: 0 });
    expect((await as("ann", "ls", "-r")).output.trim().split("\n").length).toBe(5);
    expect(treeOf(join(root.path, "ann/src"))).toEqual(treeOf(join(local.path, "src")));
    expect(treeOf(join(root.path, "guests/ben")).filter((line) => !line.startsWith("f "))).toEqual(
      treeOf(join(local.path, "src")),
    );
    expect(await as("ann", "sync", "src", "down")).toMatchObject({ status: 0 });
    expect(treeOf(join(local.path, "down"))).toEqual(treeOf(join(local.path, "src")));
    expect(await as("ann", "sync", "--up", "--delete", "src", "empty-not-there")).toMatchObject({ status: 7 });
    expect(await as("ben", "rm", "-r", "deep", "x")).toMatchObject({ status: 0 });
    expect(treeOf(join(root.path, "ann/src"))).toEqual(treeOf(join(local.path, "src")));
    for (const path of ["guests/ben/f", "../guests/ben/f", "ben/f"])
      expect((await as("ann", "cat", path)).status).toBeOneOf([3, 4]);
  });

  test("an upload into it goes on where it was cut; nobody else's token finds what it holds", async () => {
    using root = makeRoot({ "ann/": "", "ben/": "" });
    using local = temporaryFolder();
    await using it = await guard(root.path, { ann: ["write", "ann"], ben: ["read", "ben"] });
    const digest = writeLargeFile(join(local.path, "big"), 24 << 20);
    let limit = 16 << 20;
    using proxy = startProxy({ target: it.port, toServer: (bytes, at) => bytes.subarray(0, Math.max(0, limit - at)) });
    const args = ["put", join(local.path, "big"), "-d", join(local.path, "logs")];
    const env = { REPRISE_TOKEN: it.tokens.ann };
    const first = spawnClient(proxy.address, args, { env });
    const staging = join(root.path, ".reprise");
    const name = await waitFor("some of it is staged", () =>
      readdirSync(staging).find((name) => name.startsWith("put-") && sizeOf(join(staging, name)) > 8 << 20),
    );
    first.kill("SIGKILL");
    await first.exited;
    using ben = await enter(it.port, it.tokens.ben);
    expect(await ben.ask(sums("", name.slice("put-".length)))).toBe("denied");
    limit = Number.POSITIVE_INFINITY;
    expect(await runClient(proxy.address, args, { env })).toMatchObject({ status: 0 });
    const isDone = ({ event, status }: LogLine) => event === "put" && status === "ok";
    const { offset, bytes } = await waitFor("the put is logged", () => it.server.log.find(isDone));
    expect(offset).toBeGreaterThanOrEqual(8 << 20);
    expect(offset! + bytes!).toBe(24 << 20);
    expect(hashOfFile(join(root.path, "ann/big"))).toBe(digest);
    expect(readdirSync(root.path).sort()).toEqual([".reprise", "ann", "ben"]);
    expect(readdirSync(join(root.path, "ann"))).toEqual(["big"]);
  });

  test("whose folder is moved and replaced: who is in finds what has its name now, and no link", async () => {
    using root = makeShared();
    writeFileSync(join(root.path, "other/a"), SECRET);
    await using it = await guard(root.path, { ann: ["write", "mine"] });
    using guest = await enter(it.port, it.tokens.ann);
    expect(await guest.ask(get("a"))).toBe("ok");
    renameSync(join(root.path, "mine"), join(root.path, "was-mine"));
    symlinkSync("other", join(root.path, "mine"));
    const before = readdirSync(join(root.path, "was-mine"));
    for (const request of [get("a"), get("s"), put("n"), list("")]) expect(await guest.ask(request)).toBe("not_found");
    expect(readdirSync(join(root.path, "was-mine"))).toEqual(before);
    expect(readdirSync(join(root.path, "other")).sort()).toEqual(["a", "s"]);
    expect(guest.received().includes(SECRET)).toBe(false);
    await expect(enter(it.port, it.tokens.ann)).rejects.toThrow("access denied");
    unlinkSync(join(root.path, "mine"));
    mkdirSync(join(root.path, "mine"));
    expect(await guest.ask(put("n"))).toBe("ok");
    expect(readFileSync(join(root.path, "mine/n"), "utf8")).toBe("new");
  });

  test("whose folder is swapped for a link again and again: who gets in sees the folder or nothing, 300 times", async () => {
    using root = makeShared();
    for (const name of ["a", "b"]) writeFileSync(join(root.path, "other", name), SECRET);
    await using it = await guard(root.path, { ann: ["write", "mine"] });
    const swap = Bun.spawn(
      [
        process.execPath,
        "-e",
        `const { renameSync, symlinkSync, unlinkSync } = require("node:fs");
         process.chdir(process.argv[1]);
         for (;;) {
           renameSync("mine", "hidden");
           symlinkSync("other", "mine");
           unlinkSync("mine");
           renameSync("hidden", "mine");
         }`,
        root.path,
      ],
      { stdio: ["ignore", "ignore", "inherit"] },
    );
    const seen = { in: 0, denied: 0 };
    // Until there was a race, however little of the processor the other gets.
    const isRace = () => Math.min(seen.in, seen.denied) > 0;
    let round = 0;
    for (; round < 10 || (!isRace() && round < 100); round++) {
      const visits = Array.from({ length: 30 }, async () => {
        using guest = await visit(it.port);
        const requests = [get("a"), list(""), put("n"), { action: "quit" } as const].map(encodeRequest);
        guest.socket.write(Buffer.concat([encodeHello({ token: it.tokens.ann }), ...requests]));
        await waitFor("the end", () => guest.closed());
        const codes = guest.answers().map(codeOf);
        expect(guest.received().includes(SECRET)).toBe(false);
        seen[codes.includes("denied") ? "denied" : "in"]++;
      });
      await Promise.all(visits);
    }
    swap.kill("SIGKILL");
    await swap.exited;
    expect(seen.in + seen.denied).toBe(30 * round);
    expect(isRace()).toBe(true);
    expect(readdirSync(join(root.path, "other")).sort()).toEqual(["a", "b", "s"]);
  });
});

const hashOfFile = (path: string) => new Bun.CryptoHasher("sha256").update(readFileSync(path)).digest("hex");

// ---------------------------------------------------------------------------------------------------- one refusal

const FIRST_DELAY_MS = 100;
const LAST_DELAY_MS = 10_000;
const FORGET_MS = 600_000;
const MAX_FAILED_ADDRESSES = 10_000;
/** A timer of the server may be a little early by the clock here. */
const CLOCKS_MS = 5;

test("tokens that lie in the folder that is served: status 2, and nothing is served", async () => {
  using root = makeRoot({ "sub/": "" });
  const path = join(root.path, "sub/tokens.json");
  addToken(path, { name: "ann", access: "read", folder: "" });
  const starting = startServer(root.path, { args: ["--tokens", path] });
  await expect(starting).rejects.toThrow("lies in the folder that is served");
});

describe("one refusal for all", () => {
  test("who says no more than HELLO, and does not wait, is told nothing, and counts as refused", async () => {
    using root = makeRoot(TREE);
    await using it = await guard(root.path, { ann: ["read"] });
    for (let count = 1; count <= 3; count++) {
      using raw = await connectRaw(it.port);
      raw.socket.write(encodeHello({ token: "wrong" }));
      raw.socket.shutdown();
      await waitFor("it is closed", () => raw.closed());
      expect(raw.received().length).toBe(0);
      const refused = () => it.server.log.filter(({ event, status }) => event === "close" && status === "denied");
      await waitFor("it is logged", () => refused().length === count);
    }
  });

  test("row 24: the same bytes, not before the first delay, whatever is wrong", async () => {
    using root = makeRoot({ ...TREE, "gone/x": "", "was/x": "" });
    const grants: Grants = {
      read: ["read"],
      replica: ["replica"],
      old: ["write", "", PAST],
      gone: ["write", "gone"],
      link: ["write", "was"],
      file: ["write", "f"],
    };
    await using it = await guard(root.path, grants);
    const tokens = it.tokens as Record<string, string>;
    rmSync(join(root.path, "gone"), { recursive: true });
    rmSync(join(root.path, "was"), { recursive: true });
    symlinkSync("r", join(root.path, "was"));
    const failures: [string, string, Request?][] = [
      ["unknown", `rprs_${"x".repeat(43)}`],
      ["short", "x"],
      ["long", "x".repeat(255)],
      ["not of ASCII", "\u00fc"],
      ["none", ""],
      ...["old", "gone", "link", "file"].map((name): [string, string] => [name, tokens[name]!]),
      ...Object.entries(WRITING).map(([what, request]): [string, string, Request] => [what, tokens.read!, request]),
      ["a replica's put", tokens.replica!, put("p")],
      ["a put of much", tokens.read!, put("p", { content: undefined, size: 1e9, id: UPLOAD_ID })],
    ];
    const frames = await Promise.all(
      failures.map(async ([what, token, request]) => {
        using guest = request ? await enter(it.port, token) : await visit(it.port);
        const before = guest.received().length;
        const startedAt = performance.now();
        guest.socket.write(request ? encodeRequest(request) : encodeHello({ token }));
        await waitFor(`${what} is answered`, () => guest.closed());
        expect(performance.now() - startedAt).toBeGreaterThanOrEqual(FIRST_DELAY_MS - CLOCKS_MS);
        return { what, frame: guest.received().subarray(before).toString("hex") };
      }),
    );
    const { frame } = frames[0]!;
    expect(frame.length).toBeGreaterThan(2 * "access denied".length);
    expect(frames).toEqual(failures.map(([what]) => ({ what, frame })));
  });

  test("whatever it was before, the next failure of the address waits twice as long", async () => {
    using root = makeRoot(TREE);
    await using it = await guard(root.path, { ann: ["read"], old: ["read", "", PAST] });
    const address = ownAddress();
    const fail: (() => Promise<unknown>)[] = [
      () => enter(it.port, "unknown", address),
      async () => (await enter(it.port, it.tokens.ann, address)).ask(put("p")),
      () => enter(it.port, "", address),
      () => enter(it.port, it.tokens.old, address),
    ];
    for (const [index, attempt] of fail.entries()) {
      const startedAt = performance.now();
      await attempt().catch(() => {});
      expect(performance.now() - startedAt).toBeGreaterThanOrEqual(FIRST_DELAY_MS * 2 ** index - CLOCKS_MS);
    }
    // Who has a token need not wait for what others from there have done.
    using guest = await enter(it.port, it.tokens.ann, address);
    expect(await guest.ask(get("f"))).toBe("ok");
  });

  test("the client says what it needs, with status 4, and does not try again", async () => {
    using root = makeRoot(TREE);
    await using it = await guard(root.path, { ann: ["read"] });
    const runs: [string, string[]][] = [
      ["", ["cat", "f"]],
      ["rprs_wrong", ["ls"]],
      [it.tokens.ann, ["put", join(root.path, "f"), "-t", "p"]],
      [it.tokens.ann, ["rm", "f"]],
    ];
    for (const [token, args] of runs) {
      const { status, output, errors } = await runClient(it.server.address, args, { env: { REPRISE_TOKEN: token } });
      expect({ status, output, errors }).toEqual({
        status: 4,
        output: "",
        errors: "error: access denied: no token (--token-file, REPRISE_TOKEN), or none that allows this\n",
      });
    }
  });
});

// ---------------------------------------------------------------------------------------------------- admission

/** The supervisor's count, and a clock that goes as it is told. */
function counting(limits: Partial<AdmissionLimits> = {}) {
  const clock = { now: 0 };
  const admission = new Admission({ maxConnections: 1e6, maxPerAddress: 0, ...limits }, () => clock.now);
  let id = 0;
  const ask = (worker: number, kind: "enter" | "failed", address: string) => {
    const asked = ++id;
    const answer = admission.answer(worker, { kind, id: asked, address });
    expect(answer?.id).toBe(asked);
    return answer!.reply;
  };
  return {
    admission,
    clock,
    enter: (address: string, worker = 1) => ask(worker, "enter", address),
    failed: (address: string, worker = 1) => ask(worker, "failed", address),
    leave: (address: string, worker = 1) =>
      expect(admission.answer(worker, { kind: "leave", address })).toBeUndefined(),
  };
}

describe("Admission", () => {
  test("the wait doubles with each failure up to the last, whichever worker it was", () => {
    const { failed } = counting();
    const waits = Array.from({ length: 12 }, (_, index) => failed("192.0.2.1", (index % 3) + 1));
    expect(waits).toEqual([100, 200, 400, 800, 1600, 3200, 6400, ...Array(5).fill(LAST_DELAY_MS)]);
    expect(failed("192.0.2.2")).toBe(FIRST_DELAY_MS);
    for (let count = 0; count < 2_000; count++) failed("192.0.2.1");
    expect(failed("192.0.2.1")).toBe(LAST_DELAY_MS);
  });

  test("an address begins anew when it has not failed for ten minutes", () => {
    const { failed, clock } = counting();
    for (let count = 0; count < 3; count++) failed("192.0.2.1");
    clock.now += FORGET_MS - 1;
    expect(failed("192.0.2.1")).toBe(800);
    clock.now += FORGET_MS;
    expect(failed("192.0.2.1")).toBe(FIRST_DELAY_MS);
    expect(failed("192.0.2.1")).toBe(2 * FIRST_DELAY_MS);
  });

  test("so many addresses are remembered: the one that has not failed for the longest goes first", () => {
    const { failed } = counting();
    const address = (index: number) => `10.${index >> 16}.${(index >> 8) & 255}.${index & 255}`;
    for (let index = 0; index < MAX_FAILED_ADDRESSES; index++) failed(address(index));
    expect(failed(address(0))).toBe(2 * FIRST_DELAY_MS);
    failed("192.0.2.1");
    expect(failed(address(1))).toBe(FIRST_DELAY_MS);
    expect(failed(address(0))).toBe(4 * FIRST_DELAY_MS);
    expect(failed(address(MAX_FAILED_ADDRESSES - 1))).toBe(2 * FIRST_DELAY_MS);
  });

  const same: [string, string, boolean][] = [
    ["2001:db8:1:2::1", "2001:db8:1:2:ffff:ffff:ffff:ffff", true],
    ["2001:db8:1:2:3:4:5:6", "2001:db8:1:2::", true],
    ["2001:db8:1:2::1", "2001:db8:1:3::1", false],
    ["2001:db8::1", "2001:db8:0:0:9::1", true],
    ["2001:db8::1", "2001:db8:0:1::1", false],
    ["::1", "::2", true],
    ["::1", "1::", false],
    ["fe80::1%eth0", "fe80::2%eth0", true],
    ["192.0.2.1", "::ffff:192.0.2.1", true],
    ["192.0.2.1", "::FFFF:192.0.2.1", true],
    ["::ffff:192.0.2.1", "::ffff:192.0.2.2", false],
    ["192.0.2.1", "192.0.2.2", false],
    ["::ffff:192.0.2.1", "::1", false],
  ];
  test.each(same)("%s and %s count as one: %p", (one, other, isSame) => {
    const { enter, leave, failed } = counting({ maxPerAddress: 1 });
    expect(enter(one)).toBe("welcome");
    expect(enter(other)).toBe(isSame ? "full_for_address" : "welcome");
    leave(isSame ? other : one);
    expect(enter(one)).toBe("welcome");
    failed(one);
    expect(failed(other)).toBe(isSame ? 2 * FIRST_DELAY_MS : FIRST_DELAY_MS);
  });

  test("counts exactly, over workers and addresses, against a count of our own (20,000 steps)", () => {
    const limits = { maxConnections: 40, maxPerAddress: 7 };
    const { admission, enter, leave } = counting(limits);
    const addresses = Array.from({ length: 10 }, (_, index) => `192.0.2.${index}`);
    let held: { worker: number; address: string }[] = [];
    let state = 7;
    const random = (below: number) => {
      state = (Math.imul(state, 1_103_515_245) + 12_345) >>> 0;
      return Math.floor((state / 2 ** 32) * below);
    };
    const seen = new Map<unknown, number>();
    for (let step = 0; step < 20_000; step++) {
      const address = addresses[random(10)]!;
      const worker = random(4);
      const choice = random(100);
      if (choice < 60) {
        const full = held.length >= limits.maxConnections && "full";
        const mine = held.filter((one) => one.address === address).length;
        const expected = mine >= limits.maxPerAddress ? "full_for_address" : full || "welcome";
        expect(enter(address, worker)).toBe(expected);
        seen.set(expected, (seen.get(expected) ?? 0) + 1);
        if (expected === "welcome") held.push({ worker, address });
      } else if (choice < 99 && held.length > 0) {
        const [one] = held.splice(random(held.length), 1);
        leave(one!.address, one!.worker);
      } else {
        admission.forget(worker);
        held = held.filter((one) => one.worker !== worker);
      }
    }
    expect(seen.size).toBe(3);
    expect(Math.min(...seen.values())).toBeGreaterThan(20);
  });

  test("what a worker held that died is free again, what the others hold is not", () => {
    const { admission, enter } = counting({ maxConnections: 4, maxPerAddress: 3 });
    for (const [address, worker] of [
      ["192.0.2.1", 1],
      ["192.0.2.1", 1],
      ["192.0.2.1", 2],
      ["192.0.2.2", 2],
    ] as const)
      expect(enter(address, worker)).toBe("welcome");
    expect(enter("192.0.2.3", 2)).toBe("full");
    admission.forget(1);
    admission.forget(1);
    admission.forget(3);
    expect(["192.0.2.1", "192.0.2.1", "192.0.2.1"].map((address) => enter(address, 1))).toEqual([
      "welcome",
      "welcome",
      "full_for_address",
    ]);
    expect(enter("192.0.2.3", 1)).toBe("full");
  });
});

test("Gate gives each its own answer, in whatever order they come", async () => {
  const asked: Question[] = [];
  const gate = new Gate((question) => void asked.push(question));
  const [first, second, third] = [gate.enter("a"), gate.failed("b"), gate.enter("c")];
  gate.leave("d");
  expect(asked.map(({ kind, address }) => `${kind} ${address}`)).toEqual(["enter a", "failed b", "enter c", "leave d"]);
  const reply = (index: number, reply: Reply["reply"]) =>
    gate.onReply({ id: (asked[index] as { id: number }).id, reply });
  reply(2, "full");
  reply(0, "welcome");
  reply(1, 400);
  reply(1, 800);
  expect(await Promise.all([first, second, third])).toEqual(["welcome", 400, "full"]);
});

// ---------------------------------------------------------------------------------------------------- client

/** Takes connections and answers nothing; it counts what came. */
function startRecorder(): { port: number; opened: number; bytes: number } & Disposable {
  const recorder = { port: 0, opened: 0, bytes: 0 };
  const listener = Bun.listen({
    hostname: "127.0.0.1",
    port: 0,
    socket: {
      open: () => void recorder.opened++,
      data: (_, bytes) => {
        recorder.bytes += bytes.length;
      },
    },
  });
  recorder.port = listener.port;
  return Object.assign(recorder, { [Symbol.dispose]: () => listener.stop(true) });
}

/** For a client that is to fail before it waits for an answer: where it does wait, none comes. */
const BRIEFLY = ["--timeout", "10", "--retries", "0"];

/** Where this machine has another address than loopback ones: a network of its own. */
const ELSEWHERE = "192.0.2.1";
const NETWORK = `ip link set lo up && ip addr add ${ELSEWHERE}/32 dev lo && echo ready && exec cat`;
interface Network {
  /** Runs a program in it. */
  runBy: string[];
  stop(): void;
}

async function startNetwork(): Promise<Network | undefined> {
  if (!["unshare", "nsenter", "ip"].every((tool) => Bun.which(tool))) return undefined;
  const child = Bun.spawn(["unshare", "-r", "-n", "sh", "-c", NETWORK], { stdio: ["pipe", "pipe", "ignore"] });
  const { value } = await child.stdout.getReader().read();
  if (!value || new TextDecoder().decode(value) !== "ready\n") return undefined;
  const runBy = ["nsenter", "--preserve-credentials", "-U", "-n", "-t", String(child.pid)];
  return { runBy, stop: () => void child.stdin.end() };
}

const network = await startNetwork();
afterAll(() => network?.stop());
if (!network) console.warn("Skipped: other addresses than loopback need unshare, nsenter, ip and user namespaces");

/** A recorder in that network: at `ELSEWHERE`, or on loopback with a REDIRECT to there. Its lines say what came. */
const RECORDER = `
  const { encodeRedirect } = await import(process.argv[1]);
  const listen = (hostname, answer) => Bun.listen({ hostname, port: 0, socket: {
    open: (socket) => console.log("open", hostname),
    data(socket, bytes) { console.log("data", hostname, bytes.length); if (answer) socket.write(answer); },
    close: () => console.log("close", hostname),
  } });
  const { port } = listen(process.argv[2]);
  console.log("ports", port, listen("127.0.0.1", encodeRedirect(process.argv[2], port)).port);
`;

async function startRecorderElsewhere() {
  const cmd = [...network!.runBy, process.execPath, "-e", RECORDER, join(HOME, "protocol.ts"), ELSEWHERE];
  const child = Bun.spawn(cmd, { stdio: ["ignore", "pipe", "inherit"] });
  let text = "";
  const reading = (async () => {
    for await (const bytes of child.stdout) text += new TextDecoder().decode(bytes);
  })();
  const ports = await waitFor("the recorder listens", () => /^ports (\d+) (\d+)$/m.exec(text));
  return {
    elsewhere: `${ELSEWHERE}:${ports[1]}`,
    redirecting: `127.0.0.1:${ports[2]}`,
    lines: () => text.split("\n").filter((line) => line.includes(ELSEWHERE)),
    async [Symbol.asyncDispose]() {
      child.kill();
      await reading;
    },
  };
}

const hasIPv6 = existsSync("/proc/net/if_inet6") && readFileSync("/proc/net/if_inet6", "utf8").includes(" lo");
if (!hasIPv6) console.warn("Skipped: the test of ::1, which this machine does not have");

describe("the client's token", () => {
  test("from REPRISE_TOKEN, or from --token-file, which goes before it: a file, a pipe", async () => {
    using root = makeRoot(TREE);
    using file = tokenFile();
    await using it = await guard(root.path, { ann: ["read"] });
    const { address } = it.server;
    const cat = (env: Record<string, string>, ...args: string[]) => runClient(address, ["cat", "f", ...args], { env });
    expect((await cat({ REPRISE_TOKEN: it.tokens.ann })).output).toBe("content");
    expect((await cat({ REPRISE_TOKEN: ` ${it.tokens.ann}\n` })).output).toBe("content");
    for (const mode of [0o600, 0o400]) {
      writeFileSync(file.path, `${it.tokens.ann}\n`);
      chmodSync(file.path, mode);
      expect((await cat({ REPRISE_TOKEN: "another" }, "--token-file", file.path)).output).toBe("content");
      rmSync(file.path);
    }
    const runBy = ["bash", "-c", 'exec "$@" --token-file <(echo "$T")', "bash"];
    expect((await runClient(address, ["cat", "f"], { runBy, env: { T: it.tokens.ann } })).output).toBe("content");
    expect((await cat({ REPRISE_TOKEN: "" })).status).toBe(4);
  });

  test.each([0o640, 0o604, 0o644, 0o660, 0o602, 0o777])(
    "a file of mode %o is refused with status 4, and nothing is sent",
    async (mode) => {
      using file = tokenFile();
      using recorder = startRecorder();
      writeFileSync(file.path, "rprs_the-token");
      chmodSync(file.path, mode);
      const args = ["cat", "f", "--token-file", file.path, ...BRIEFLY];
      const { status, output, errors } = await runClient(`127.0.0.1:${recorder.port}`, args);
      expect({ status, output }).toEqual({ status: 4, output: "" });
      expect(errors).toBe(
        `error: the token in "${file.path}" can be read by others; chmod 600 it, or make a new one\n`,
      );
      expect(recorder.opened).toBe(0);
    },
  );

  const contents: [string, string | Uint8Array | undefined, number, string][] = [
    ["that is not there", undefined, 7, "cannot be read: ENOENT"],
    ["that is empty", "", 2, "holds no access token"],
    ["of blanks", " \n\n", 2, "holds no access token"],
    ["of two lines", "rprs_one\nrprs_two\n", 2, "holds no access token"],
    ["of binary", randomBytes(100), 2, "holds no access token"],
    ["of 256 bytes", "x".repeat(256), 2, "holds no access token"],
    ["of a megabyte", "x".repeat(1_000_000), 2, "holds no access token"],
    ["of other letters", "rprs_\u00fc", 2, "holds no access token"],
  ];
  test.each(contents)("a file %s: said, nothing of it, and nothing is sent", async (_, content, status, text) => {
    using file = tokenFile();
    using recorder = startRecorder();
    if (content !== undefined) writeFileSync(file.path, content, { mode: 0o600 });
    const run = await runClient(`127.0.0.1:${recorder.port}`, ["cat", "f", "--token-file", file.path, ...BRIEFLY]);
    expect(run).toMatchObject({ status, output: "" });
    expect(run.errors).toContain(text);
    expect(run.errors.trim().split("\n").length).toBe(1);
    if (content?.length) expect(run.errors).not.toContain(String(content).trim() || "nothing");
    expect(recorder.opened).toBe(0);
  });

  test("a folder for a file, and a REPRISE_TOKEN that is none: said, nothing of it, and nothing is sent", async () => {
    using folder = temporaryFolder();
    using recorder = startRecorder();
    const server = `127.0.0.1:${recorder.port}`;
    const asFile = await runClient(server, ["cat", "f", "--token-file", folder.path, ...BRIEFLY]);
    expect(asFile).toMatchObject({ status: 7 });
    expect(asFile.errors).toContain("cannot be read: EISDIR");
    for (const REPRISE_TOKEN of ["rprs_a b", "x".repeat(256), "rprs_\u00fc"]) {
      const run = await runClient(server, ["cat", "f", ...BRIEFLY], { env: { REPRISE_TOKEN } });
      expect(run).toMatchObject({ status: 2, output: "" });
      expect(run.errors).toContain("REPRISE_TOKEN holds no access token");
      expect(run.errors).not.toContain(REPRISE_TOKEN);
    }
    expect(recorder.opened).toBe(0);
  });

  test("a token of 255 bytes is sent as it is", async () => {
    using root = makeRoot({});
    await using it = await guard(root.path, {});
    expect((await runClient(it.server.address, ["ls"], { env: { REPRISE_TOKEN: "x".repeat(255) } })).status).toBe(4);
  });

  test("is in no output, help, resume log, server's log, or command line", async () => {
    using root = makeRoot({ "ann/f": "content" });
    using local = temporaryFolder();
    writeLargeFile(join(root.path, "ann/big"), 24 << 20);
    writeLargeFile(join(local.path, "up"), 24 << 20, 2);
    await using it = await guard(root.path, { ann: ["write", "ann"] });
    const env = { REPRISE_TOKEN: it.tokens.ann };
    const seen: string[] = [];
    const run = async (args: string[], stdin?: string) => {
      const { output, errors } = await runClient(it.server.address, args, {
        env,
        cwd: local.path,
        ...(stdin && { stdin }),
      });
      seen.push(output, errors);
    };
    for (const args of [["--help"], ["get", "--help"], ["completion", "bash"], ["status", "--json"], ["ls", "-l"]])
      await run(args);
    for (const args of [
      ["cat", "f"],
      ["get", "none"],
      ["get", "f", "--json"],
      ["put", "none"],
      ["rm", "../x"],
    ])
      await run(args);
    await run([], "ls\nstatus\nget none\n");
    // What is left of transfers that were killed.
    const here = join(local.path, "here");
    let limit = 8 << 20;
    const cut = (bytes: Uint8Array, at: number) => bytes.subarray(0, Math.max(0, limit - at));
    using proxy = startProxy({ target: it.port, toServer: cut, toClient: cut });
    for (const args of [
      ["get", "big"],
      ["put", "up"],
    ]) {
      const child = spawnClient(proxy.address, [...args, "-d", "here"], { env, cwd: local.path });
      const logs = () => (existsSync(here) ? readdirSync(here) : []).filter((name) => name.endsWith(".resume.json"));
      const isWritten = (name: string) => readFileSync(join(here, name), "utf8").includes(`"command":"${args[0]}"`);
      await waitFor("it has a log", () => logs().some(isWritten));
      seen.push(readFileSync(`/proc/${child.pid}/cmdline`, "utf8"));
      child.kill("SIGKILL");
      seen.push(await new Response(child.stderr).text());
      await child.exited;
    }
    for (const name of readdirSync(here).filter((name) => name.includes(".resume.json")))
      seen.push(readFileSync(join(here, name), "utf8"));
    expect(seen.filter((text) => text.includes('"command"')).length).toBeGreaterThanOrEqual(2);
    limit = Number.POSITIVE_INFINITY;
    await run(["resume", "-d", "here", "--server", proxy.address]);
    expect(hashOfFile(join(local.path, "here/big"))).toBe(hashOfFile(join(root.path, "ann/big")));
    const isLogged = () => it.server.log.some(({ event }) => event === "close" || event === "put");
    await waitFor("something is logged", isLogged);
    for (const pid of [it.server.process.pid, ...it.server.workers()])
      seen.push(readFileSync(`/proc/${pid}/cmdline`, "utf8"));
    await it.server.stop("SIGINT");
    seen.push(it.server.stderr(), readFileSync(it.file, "utf8"));
    for (const text of seen) expect(text).not.toContain(it.tokens.ann.slice(5));
    expect(new Set(it.server.log.map(({ token }) => token))).toContain("ann");
  });

  test("is sent over loopback by any of its names", async () => {
    using root = makeRoot(TREE);
    await using it = await guard(root.path, { ann: ["read"] });
    const env = { REPRISE_TOKEN: it.tokens.ann };
    for (const host of ["127.0.0.1", "localhost", "127.0.0.1"].concat(hasIPv6 ? ["[::ffff:127.0.0.1]"] : []))
      expect((await runClient(`tcp://${host}:${it.port}`, ["cat", "f"], { env })).output).toBe("content");
  });

  test.skipIf(!hasIPv6)("is sent to ::1", async () => {
    using root = makeRoot(TREE);
    await using it = await guard(root.path, { ann: ["read"] }, { args: ["--host", "::1"] });
    const env = { REPRISE_TOKEN: it.tokens.ann };
    expect((await runClient(`[::1]:${it.port}`, ["cat", "f"], { env })).output).toBe("content");
    expect((await runClient(`localhost:${it.port}`, ["cat", "f"], { env })).output).toBe("content");
  });

  test.skipIf(!network)("is not sent in clear to another address: not one byte, status 4", async () => {
    await using recorder = await startRecorderElsewhere();
    const { runBy } = network!;
    const { elsewhere } = recorder;
    for (const args of [["cat", "f"], ["put", "/etc/hostname"], ["get", "f", "--segments", "4"], ["ls"]]) {
      const run = await runClient(elsewhere, args, { runBy, env: { REPRISE_TOKEN: "rprs_the-token" } });
      expect(run).toMatchObject({ status: 4, output: "" });
      expect(run.errors).toBe(
        `error: ${elsewhere}: no token is sent in clear to another machine; a server with --tls-cert is tls://${elsewhere}\n`,
      );
    }
    expect(recorder.lines().filter((line) => line.startsWith("data"))).toEqual([]);
    // That something would have come, without one.
    await runClient(elsewhere, ["ls", "--timeout", "1", "--retries", "0"], { runBy });
    await waitFor("it comes", () => recorder.lines().some((line) => line.startsWith("data")));
  });

  test.skipIf(!network)("does not follow a REDIRECT there", async () => {
    await using recorder = await startRecorderElsewhere();
    const { runBy } = network!;
    const args = ["ls", "--timeout", "2", "--retries", "0"];
    const run = await runClient(recorder.redirecting, args, { runBy, env: { REPRISE_TOKEN: "rprs_the-token" } });
    expect(run).toMatchObject({ status: 4, output: "" });
    expect(run.errors).toContain(`${recorder.elsewhere}: no token is sent in clear to another machine`);
    expect(recorder.lines().filter((line) => line.startsWith("data"))).toEqual([]);
    await runClient(recorder.redirecting, args, { runBy });
    await waitFor("without one it is followed", () => recorder.lines().some((line) => line.startsWith("data")));
  });

  test("follows a REDIRECT on this machine", async () => {
    using root = makeRoot(TREE);
    await using it = await guard(root.path, { ann: ["read"] });
    const listener = Bun.listen({
      hostname: "127.0.0.1",
      port: 0,
      socket: { data: (socket) => void socket.write(encodeRedirect("127.0.0.1", it.port)) },
    });
    const run = await runClient(`127.0.0.1:${listener.port}`, ["cat", "f"], { env: { REPRISE_TOKEN: it.tokens.ann } });
    listener.stop(true);
    expect(run).toMatchObject({ status: 0, output: "content" });
  });
});

// ---------------------------------------------------------------------------------------------------- anonymous

describe("without tokens", () => {
  test("this machine may write with --writable, and a token that nobody needs harms nothing", async () => {
    using root = makeRoot(TREE);
    await using server = await startServer(root.path, { args: ["--writable"] });
    for (const request of Object.values(WRITING)) {
      using guest = await enter(server.port, "rprs_whatever");
      expect(await guest.ask(request)).toBe("ok");
    }
  });

  test.skipIf(!network)("others may read, and write only with --anonymous-write", async () => {
    using root = makeRoot(TREE);
    const { runBy } = network!;
    const refusal = "without a token only this machine may change files; --tokens or --anonymous-write opens it";
    for (const [args, status, errors] of [
      [["--writable"], 4, `error: refused: ${refusal}\n`],
      [[], 4, "error: refused: the server is read-only; started with --writable it takes changes\n"],
      [["--writable", "--anonymous-write"], 0, ""],
    ] as const) {
      await using server = await startServer(root.path, { runBy, args: ["--host", "0.0.0.0", ...args] });
      const at = (host: string, ...words: string[]) => runClient(`${host}:${server.port}`, words, { runBy });
      expect((await at(ELSEWHERE, "cat", "f")).output).toBe("content");
      for (const words of [
        ["put", join(HOME, "LICENSE"), "-t", "new"],
        ["mv", "new", "newer"],
        ["mkdir", "made"],
        ["rm", "newer"],
        ["rm", "-r", "made"],
      ])
        expect(await at(ELSEWHERE, ...words)).toMatchObject({ status, errors });
      expect(treeOf(root.path).map((line) => line.split(" ")[0])).toEqual(["f", "m", "r", "r/x"]);
      const here = await at("127.0.0.1", "put", join(HOME, "LICENSE"), "-t", "f");
      expect(here.status).toBe(args[0] === "--writable" ? 0 : 4);
      writeFileSync(join(root.path, "f"), "content");
    }
  });

  const conflicts: [string[], string][] = [
    [["--anonymous-write"], "--anonymous-write needs --writable"],
    [["--writable", "--anonymous-write", "--tokens", "t"], "--anonymous-write and --tokens exclude each other"],
    [["--tokens"], "--tokens needs a value"],
    [["--max-per-address", "-1"], "--max-per-address"],
    [["--max-per-address", "many"], "--max-per-address takes a whole number from 0"],
    [["--max-connections", "0"], "--max-connections takes a whole number from 1"],
    [["--min-rate", "slow"], "--min-rate takes a size"],
    [["--idle-timeout", "0"], "--idle-timeout takes seconds"],
  ];
  test.each(conflicts)("%j is refused with status 2", async (args, text) => {
    const child = Bun.spawn([process.execPath, join(HOME, "server.ts"), ...args], {
      cwd: HOME,
      stdio: ["ignore", "pipe", "pipe"],
    });
    const errors = await new Response(child.stderr).text();
    expect(errors).toContain(text);
    expect(errors.trim().split("\n").length).toBe(1);
    expect(await child.exited).toBe(2);
  });
});

// ---------------------------------------------------------------------------------------------------- counts

/** Says HELLO, and whether that was welcome. */
async function knock(port: number, address?: string): Promise<{ guest: Guest; verdict: string }> {
  const guest = await visit(port, address);
  guest.socket.write(encodeHello());
  const first = await waitFor(
    "a verdict",
    () => guest.answers()[0] ?? (guest.closed() ? ("lost" as const) : undefined),
  );
  return { guest, verdict: first === "lost" ? "lost" : first.type === "error" ? first.error.code : first.type };
}

/** Many at the same time; who is not welcome goes. */
async function knockAll(port: number, count: number, address?: string) {
  const all = await Promise.all(Array.from({ length: count }, () => knock(port, address)));
  for (const { guest, verdict } of all) if (verdict !== "welcome") guest[Symbol.dispose]();
  const welcome = all.filter(({ verdict }) => verdict === "welcome").map(({ guest }) => guest);
  return { welcome, others: new Set(all.map(({ verdict }) => verdict).filter((verdict) => verdict !== "welcome")) };
}

/** As many as get in, tried again until there are `count`: a place is free a moment after its holder has gone. */
async function fill(port: number, held: Guest[], count: number, address?: string): Promise<void> {
  await waitFor(`${count} are in`, async () => {
    held.push(...(await knockAll(port, Math.max(1, count - held.length), address)).welcome);
    return held.length >= count;
  });
  expect(held.length).toBe(count);
}

describe("counts over all workers", () => {
  test.each([2, 4])("--max-connections is exact over %d workers, 10 rounds", async (workers) => {
    using root = makeRoot(TREE);
    const most = 24;
    const args = ["--workers", String(workers), "--max-connections", String(most)];
    await using server = await startServer(root.path, { args });
    const { port } = server;
    const first = await knockAll(port, most + 16);
    expect({ welcome: first.welcome.length, others: [...first.others] }).toEqual({ welcome: most, others: ["busy"] });
    let held = first.welcome;
    for (let round = 0; round < 10; round++) {
      const going = held.splice(0, 5 + round);
      for (const [index, guest] of going.entries()) {
        if (index % 2 === 0) guest.socket.destroy();
        else guest.socket.end(encodeRequest({ action: "quit" }));
      }
      await fill(port, held, most);
      const more = await knockAll(port, 8);
      expect({ round, welcome: more.welcome.length, others: [...more.others] }).toEqual({
        round,
        welcome: 0,
        others: ["busy"],
      });
    }
    for (const guest of held) expect(await guest.ask(stat("f"))).toBe("ok");
    held = [];
  });

  test.each([2, 4])("kill -9 of one of %d workers frees its share and nothing else, 5 rounds", async (workers) => {
    using root = makeRoot(TREE);
    const most = 16;
    const args = ["--workers", String(workers), "--max-connections", String(most)];
    await using server = await startServer(root.path, { args });
    const { port } = server;
    let held: Guest[] = [];
    await fill(port, held, most);
    for (let round = 0; round < 5; round++) {
      const victim = server.workers()[round % workers]!;
      killHard(victim);
      await waitFor("it is gone", () => !isAlive(victim));
      await waitFor("another is there", () => server.workers().length === workers);
      // Of those that the worker had, not one is left; the others are as they were.
      const codes = await Promise.all(held.map((guest) => guest.ask(stat("f"))));
      await waitFor("who was cut knows", () => held.every((guest, index) => codes[index] === "ok" || guest.closed()));
      held = held.filter((guest) => !guest.closed());
      await fill(port, held, most);
      const more = await knockAll(port, 8);
      expect({ round, welcome: more.welcome.length }).toEqual({ round, welcome: 0 });
    }
    for (const guest of held) guest[Symbol.dispose]();
  });

  test("--max-per-address is exact for each, also with --max-connections below the sum", async () => {
    using root = makeRoot(TREE);
    const args = ["--workers", "3", "--max-per-address", "5", "--max-connections", "12"];
    await using server = await startServer(root.path, { args });
    const { port } = server;
    const [ann, ben, cem] = [ownAddress(), ownAddress(), ownAddress()];
    const [ofAnn, ofBen] = await Promise.all([knockAll(port, 15, ann), knockAll(port, 15, ben)]);
    expect([ofAnn!.welcome.length, ofBen!.welcome.length]).toEqual([5, 5]);
    const { guest: told } = await knock(port, ann);
    expect(String((told.answers()[0] as { error: Error }).error.message)).toBe(
      "too many connections from your address",
    );
    const ofCem = await knockAll(port, 15, cem);
    expect(ofCem.welcome.length).toBe(2);
    const { guest } = await knock(port, cem);
    expect(String((guest.answers()[0] as { error: Error }).error.message)).toBe("too many connections");
    for (const guest of ofAnn!.welcome.splice(0, 3)) guest[Symbol.dispose]();
    await fill(port, ofCem.welcome, 5, cem);
    expect((await knockAll(port, 3, cem)).welcome.length).toBe(0);
    expect((await knockAll(port, 3, ann)).welcome.length).toBe(0);
    const limits = () => new Set(server.log.filter(({ status }) => status === "busy").map(({ why }) => why));
    await waitFor("the limits are logged", () => limits().size === 2);
    expect(limits()).toEqual(new Set(["--max-per-address", "--max-connections"]));
  });

  test("a place is held from the first byte on: who has not said HELLO counts as well", async () => {
    using root = makeRoot(TREE);
    await using server = await startServer(root.path, { args: ["--max-connections", "3"] });
    let silent = [await visit(server.port), await visit(server.port), await visit(server.port)];
    await waitFor("nobody else gets in", async () => {
      // Who comes later may be let in sooner, at another worker: then one of these was turned away, and comes again.
      silent = await Promise.all(silent.map((guest) => (guest.closed() ? visit(server.port) : guest)));
      const { guest, verdict } = await knock(server.port);
      guest[Symbol.dispose]();
      return verdict === "busy";
    });
    for (const guest of silent) {
      guest.socket.write(encodeHello());
      await waitFor("a welcome", () => guest.answers()[0]?.type === "welcome");
      guest[Symbol.dispose]();
    }
  });

  test("clients that are turned away come back and get in", async () => {
    using root = makeRoot({ f: "content" });
    await using server = await startServer(root.path, { args: ["--max-per-address", "1"] });
    const runs = await Promise.all(Array.from({ length: 5 }, () => runClient(server.address, ["cat", "f"])));
    expect(runs.map(({ status, output }) => `${status} ${output}`)).toEqual(Array(5).fill("0 content"));
  });

  test("a folder over as many connections as the address may have", async () => {
    using root = makeRoot({ "d/a": "1", "d/b": "2", "d/c": "3" });
    using local = temporaryFolder();
    await using server = await startServer(root.path, { args: ["--max-per-address", "3"] });
    const args = ["get", "-r", "d", "--jobs", "2", "-d", local.path];
    expect(await runClient(server.address, args)).toMatchObject({ status: 0 });
    expect(treeOf(join(local.path, "d"))).toEqual(treeOf(join(root.path, "d")));
  });
});

// ---------------------------------------------------------------------------------------------------- slow peers

/** Sends `bytes` in pieces of `size`, one each `ms`, until all are gone or the connection is; resolves with the count. */
async function dribble(guest: Guest, bytes: Uint8Array, size: number, ms: number): Promise<number> {
  let at = 0;
  for (; at < bytes.length && !guest.closed(); at += size) {
    guest.socket.write(bytes.subarray(at, at + size));
    await Bun.sleep(ms);
  }
  return at;
}

/** Reads what comes a piece at a time, with a pause after each, until the connection ends; resolves with the bytes. */
async function sip(port: number, request: Request, ms: number): Promise<number> {
  const socket = connect({ host: "127.0.0.1", port, localAddress: ownAddress() });
  let bytes = 0;
  let isClosed = false;
  socket.on("error", () => {});
  socket.on("close", () => {
    isClosed = true;
  });
  socket.on("data", (piece: Buffer) => {
    bytes += piece.length;
    socket.pause();
    setTimeout(() => socket.resume(), ms);
  });
  socket.write(Buffer.concat([encodeHello(), encodeRequest(request), encodeRequest({ action: "quit" })]));
  await waitFor("the end", () => isClosed);
  return bytes;
}

/** Such limits that a test on a busy machine keeps to them where it is to. */
const SLOW = ["--idle-timeout", "2", "--min-rate", "10000", "--writable"];
const dataFrame = (content: Uint8Array) =>
  Buffer.concat([encodeDataHeader(content.length, Bun.hash.crc32(content)), content]);
const dataFrames = (content: Uint8Array, each: number) =>
  Array.from({ length: Math.ceil(content.length / each) }, (_, index) =>
    dataFrame(content.subarray(index * each, (index + 1) * each)),
  );

/** How the server says goodbye to a peer, and logs it. */
async function expectIdle(server: Server, guest: Guest, event = "close"): Promise<void> {
  await waitFor("it is closed", () => guest.closed());
  expect(codeOf(guest.answers().at(-1))).toBe("idle");
  await waitFor("it is logged", () =>
    server.log.some((line) => line.peer === guest.address && line.event === event && line.status === "idle"),
  );
}

describe("slow peers", () => {
  test("a HELLO, a request, or nothing but a byte now and then: closed and logged", async () => {
    using root = makeRoot(TREE);
    await using server = await startServer(root.path, { args: SLOW });
    using hello = await visit(server.port);
    using request = await enter(server.port);
    using silent = await enter(server.port);
    using mute = await visit(server.port);
    const long = get("x".repeat(200));
    await Promise.all([
      dribble(hello, encodeHello({ token: "x".repeat(200) }), 1, 50),
      dribble(request, encodeRequest(long), 1, 50),
      ...[hello, request, silent, mute].map((guest) => expectIdle(server, guest)),
    ]);
    expect((await runClient(server.address, ["cat", "f"])).output).toBe("content");
  });

  test("an upload below the rate is closed, what came is kept, and it can be gone on with", async () => {
    using root = makeRoot({});
    await using server = await startServer(root.path, { args: SLOW });
    const content = randomBytes(300_000);
    const upload = put("f", { id: UPLOAD_ID, size: content.length, content: undefined });
    using first = await enter(server.port);
    first.socket.write(Buffer.concat([encodeRequest(upload), dataFrame(content.subarray(0, 200_000))]));
    // 30 bytes each 50 ms: never idle, and far below the rate.
    const frames = Buffer.concat(dataFrames(content.subarray(200_000, 220_000), 21));
    await Promise.all([dribble(first, frames, 30, 50), expectIdle(server, first, "put")]);
    expect((first.answers().at(-1) as { error: Error }).error.message).toContain("fewer than 10000 bytes a second");
    expect(existsSync(join(root.path, "f"))).toBe(false);
    using second = await enter(server.port);
    expect(await second.ask(sums("", UPLOAD_ID))).toBe("ok");
    const held = second.answers().flatMap((answer) => (answer.type === "sum" ? answer.length : []));
    const [offset] = held as [number];
    expect(offset).toBeGreaterThanOrEqual(200_000);
    const rest = content.subarray(offset);
    const going = second.ask({ ...upload, offset });
    second.socket.write(Buffer.concat([dataFrame(rest), encodeEnd(rest.length)]));
    expect(await going).toBe("ok");
    expect(readFileSync(join(root.path, "f")).equals(Buffer.from(content))).toBe(true);
  });

  test("an upload of which nothing comes any more is closed, also with --min-rate 0", async () => {
    using root = makeRoot({});
    const args = ["--writable", "--idle-timeout", "1.5", "--min-rate", "0"];
    await using server = await startServer(root.path, { args });
    using guest = await enter(server.port);
    const upload = put("f", { id: UPLOAD_ID, size: 1_000_000, content: undefined });
    guest.socket.write(Buffer.concat([encodeRequest(upload), dataFrame(randomBytes(1000))]));
    await expectIdle(server, guest, "put");
  });

  test("a reader below the rate is closed and logged", async () => {
    using root = makeRoot({});
    writeLargeFile(join(root.path, "big"), 256 << 20);
    const args = ["--idle-timeout", "1", "--min-rate", "1G"];
    await using server = await startServer(root.path, { args });
    expect(await sip(server.port, get("big"), 20)).toBeLessThan(256 << 20);
    await waitFor("it is logged", () =>
      server.log.some(({ event, status }) => event === "get" && status === "timeout"),
    );
  });

  test("one that is slow but above the rate is left alone, either way", async () => {
    using root = makeRoot({});
    const size = 16 << 20;
    const digest = writeLargeFile(join(root.path, "big"), size);
    const args = ["--writable", "--idle-timeout", "5", "--min-rate", "100"];
    await using server = await startServer(root.path, { args });
    using guest = await enter(server.port);
    const content = randomBytes(20_000);
    const going = guest.ask(put("f", { size: content.length, content: undefined }));
    const frames = Buffer.concat([...dataFrames(content, 150), encodeEnd(content.length)]);
    const [, read] = await Promise.all([dribble(guest, frames, 150, 40), sip(server.port, get("big"), 20)]);
    expect(await going).toBe("ok");
    expect(readFileSync(join(root.path, "f")).equals(Buffer.from(content))).toBe(true);
    expect(read).toBeGreaterThan(size);
    await waitFor(
      "both are logged",
      () => server.log.filter(({ event, status }) => event !== "quit" && status === "ok").length === 2,
    );
    expect(hashOfFile(join(root.path, "big"))).toBe(digest);
  });

  test.skipIf(process.env.REPRISE_FFI === "0")(
    "one that reads all the time is left alone while the kernel has more to send than it reads in --idle-timeout",
    async () => {
      using root = makeRoot({});
      writeLargeFile(join(root.path, "big"), 64 << 20);
      await using server = await startServer(root.path, { args: ["--idle-timeout", "3", "--min-rate", "10000"] });
      const socket = connect({ host: "127.0.0.1", port: server.port });
      let pieces = 0;
      let end: string | undefined;
      for (const event of ["error", "close", "end"]) socket.on(event, () => (end ??= event));
      socket.on("data", () => {
        pieces++;
        socket.pause();
        setTimeout(() => socket.resume(), 250);
      });
      socket.write(Buffer.concat([encodeHello(), encodeRequest(get("big"))]));
      await waitFor("as much is read as takes several such times", () => pieces >= 25 || end);
      expect([end, server.log.filter(({ status }) => status === "timeout")]).toEqual([undefined, []]);
      socket.destroy();
    },
  );

  test("--min-rate 0 leaves alone whoever sends a byte within --idle-timeout", async () => {
    using root = makeRoot({});
    await using server = await startServer(root.path, {
      args: ["--writable", "--idle-timeout", "5", "--min-rate", "0"],
    });
    using guest = await enter(server.port);
    const going = guest.ask(put("f", { size: 30, content: undefined }));
    // One frame that takes longer than that.
    const frames = Buffer.concat([dataFrame(randomBytes(30)), encodeEnd(30)]);
    await dribble(guest, frames, 1, 100);
    expect(await going).toBe("ok");
  });

  test("a server's own --limit-rate below the rate cuts nobody", async () => {
    using root = makeRoot({ f: randomBytes(100_000) });
    using local = temporaryFolder();
    await using server = await startServer(root.path, { args: [...SLOW, "--min-rate", "1M", "--limit-rate", "35K"] });
    const got = join(local.path, "f");
    expect(await runClient(server.address, ["get", "f", "-d", local.path])).toMatchObject({ status: 0, errors: "" });
    expect(await runClient(server.address, ["put", got, "-t", "g", "-d", local.path])).toMatchObject({
      status: 0,
      errors: "",
    });
    expect(readFileSync(join(root.path, "g")).equals(readFileSync(join(root.path, "f")))).toBe(true);
  });

  test("a client whose --limit-rate is lower is told so", async () => {
    using root = makeRoot({});
    using local = temporaryFolder();
    const file = join(local.path, "f");
    writeFileSync(file, randomBytes(2_000_000));
    await using server = await startServer(root.path, { args: SLOW });
    const args = ["put", file, "-t", "f", "-d", local.path, "--limit-rate", "2000", "--retries", "0"];
    const { status, errors } = await runClient(server.address, args);
    expect(status).toBe(8);
    expect(errors).toContain("closed for lack of activity: fewer than 10000 bytes a second for 2 s");
  });
});

// ---------------------------------------------------------------------------------------------------- frames

/** length u32, type u8, crc32 u32, and so many bytes behind it. */
function frameOf(type: number, payload: Uint8Array): Uint8Array {
  const frame = Buffer.alloc(9 + payload.length);
  frame.writeUInt32BE(payload.length, 0);
  frame[4] = type;
  frame.set(payload, 9);
  const head = Bun.hash.crc32(frame.subarray(0, 5));
  frame.writeUInt32BE(Bun.hash.crc32(payload, head), 5);
  return frame;
}

describe("frames before HELLO", () => {
  test("of more than 4 KiB are refused by their length alone; a later version's HELLO may have 4 KiB", async () => {
    using root = makeRoot(TREE);
    await using server = await startServer(root.path);
    using long = await visit(server.port);
    long.socket.write(frameOf(1, new Uint8Array(MAX_HELLO_BYTES + 1)).subarray(0, 9));
    await waitFor("it is refused", () => long.closed());
    expect(long.answers().map(codeOf)).toEqual(["bad_frame"]);
    using later = await visit(server.port);
    const hello = Buffer.concat([encodeHello({ version: 9 }).subarray(9), new Uint8Array(MAX_HELLO_BYTES)]);
    later.socket.write(frameOf(1, hello.subarray(0, MAX_HELLO_BYTES)));
    await waitFor("it is answered", () => later.closed());
    expect(later.answers().map(codeOf)).toEqual(["version"]);
  });

  test.each([
    [255, "ok"],
    [256, "bad_frame"],
    [4000, "bad_frame"],
  ])("a HELLO with a token of %d bytes: %s", async (length, expected) => {
    using root = makeRoot(TREE);
    await using server = await startServer(root.path);
    using guest = await visit(server.port);
    guest.socket.write(encodeHello({ token: "x".repeat(length) }));
    await waitFor("an answer", () => guest.answers()[0]);
    expect(codeOf(guest.answers()[0])).toBe(expected);
  });

  test("a request of 64 KiB right behind HELLO is taken, however the bytes are cut; one byte more is not", async () => {
    using root = makeRoot(TREE);
    await using it = await guard(root.path, { ann: ["write"] });
    const hello = encodeHello({ token: it.tokens.ann });
    const content = randomBytes(MAX_WHOLE_BYTES);
    const whole = Buffer.concat([
      hello,
      encodeRequest(put("w", { content, size: content.length })),
      encodeRequest(get("w")),
    ]);
    for (const at of [0, 1, 8, 9, hello.length - 1, hello.length, hello.length + 1, hello.length + 9, 5000, 60_000]) {
      using guest = await visit(it.port);
      guest.socket.setNoDelay(true);
      guest.socket.write(whole.subarray(0, at));
      await Bun.sleep(5);
      guest.socket.write(whole.subarray(at));
      await waitFor("it is done", () => guest.answers().some(({ type }) => type === "end" || type === "file"));
      expect(guest.answers().every((answer) => codeOf(answer) === "ok")).toBe(true);
      expect(readFileSync(join(root.path, "w")).equals(Buffer.from(content))).toBe(true);
      rmSync(join(root.path, "w"));
    }
    for (const [length, code] of [
      [MAX_REQUEST_BYTES, "bad_frame"],
      [MAX_REQUEST_BYTES + 1, "bad_frame"],
    ] as const) {
      using guest = await visit(it.port);
      // All of the first is read, to find that no path is so long; of the second, its length.
      const request = frameOf(0x12, new Uint8Array(length));
      guest.socket.write(Buffer.concat([hello, length > MAX_REQUEST_BYTES ? request.subarray(0, 9) : request]));
      await waitFor("it is closed", () => guest.closed());
      expect(guest.answers().map(codeOf)).toEqual(["ok", code]);
    }
  });
});

// ---------------------------------------------------------------------------------------------------- log

/** What a line of a log never has: control and format characters, but for its end. */
const UNSHOWN = /[^\P{Cc}\n]|[\p{Cf}\p{Zl}\p{Zp}]/u;

describe("the log", () => {
  const NAMES = [
    "a\u202eb",
    "\x1b[31mred",
    "two\nlines",
    "cr\rlf",
    "\u2066x\u2069",
    "\x7f\x9b31m",
    'quo"te\\',
    "\u200fx",
  ];

  test("each refusal is one line of JSON, its names escaped; `token` is the token's name", async () => {
    using root = makeRoot(TREE);
    await using it = await guard(root.path, { ann: ["read"] });
    using guest = await enter(it.port, it.tokens.ann);
    for (const name of NAMES) await guest.ask(get(name));
    expect(await guest.ask(put("\u202e\n\x1b[2J"))).toBe("denied");
    using unknown = await visit(it.port);
    unknown.socket.write(encodeHello({ token: "rprs_guessed" }));
    await waitFor("it is closed", () => unknown.closed());
    await waitFor("all is logged", () => it.logOf(guest).length === NAMES.length + 1 && it.logOf(unknown).length === 1);
    expect(it.logOf(guest).map(({ path }) => path)).toEqual([...NAMES, "\u202e\n\x1b[2J"]);
    for (const line of it.logOf(guest)) {
      expect(line).toMatchObject({ token: "ann", worker: expect.any(Number), time: expect.any(String) });
      expect(line.status).toMatch(/^(not_found|bad_name|denied)$/);
      expect(line.why).toBe(line.status === "denied" ? "the token is for read" : undefined);
    }
    expect(it.logOf(unknown)[0]).toMatchObject({ event: "close", status: "denied" });
    expect(it.logOf(unknown)[0]!.token).toBeUndefined();
    expect(it.server.stderr()).not.toMatch(UNSHOWN);
    expect(it.server.stderr()).not.toContain("guessed");
    expect(it.server.stderr()).not.toContain(it.tokens.ann);
  });

  test("in pretty as well", async () => {
    using root = makeRoot(TREE);
    await using it = await guard(root.path, { ann: ["read"] }, { args: ["--log", "pretty"] });
    using guest = await enter(it.port, it.tokens.ann);
    for (const name of NAMES) await guest.ask(get(name));
    expect(await guest.ask(put("p"))).toBe("denied");
    const lines = () =>
      it.server
        .stderr()
        .split("\n")
        .filter((line) => line.includes(guest.address));
    await waitFor("all is logged", () => lines().length === NAMES.length + 1);
    for (const line of lines())
      expect(line).toMatch(
        /^\d\d:\d\d:\d\d \[\d\] 127\.77\.\d+\.\d+ ann (get|put) ".*, (\w+|denied: the token is for read)$/,
      );
    expect(it.server.stderr()).not.toMatch(UNSHOWN);
  });

  test("a flood of 2,000 refusals is 30 lines", async () => {
    using root = makeRoot(TREE);
    await using server = await startServer(root.path, { args: ["--workers", "1"] });
    for (let round = 0; round < 20; round++) {
      const flood = Array.from({ length: 100 }, async () => {
        using guest = await visit(server.port);
        guest.socket.write("GET / HTTP/1.1\r\n\r\n");
        await waitFor("it is refused", () => guest.closed());
      });
      await Promise.all(flood);
    }
    using guest = await enter(server.port);
    await guest.ask(stat("f"));
    await waitFor("what came after is logged", () => server.log.some(({ event }) => event === "stat"));
    expect(server.log.filter(({ status }) => status === "bad_frame").length).toBe(30);
    expect(server.log.length).toBe(31);
  });

  test("after a minute the rest is one line for each status, and the next minute begins anew", async () => {
    // In a process of its own, whose timer is the test's.
    const code = `
      const minutes = [];
      globalThis.setTimeout = (end, ms) => (minutes.push({ end, ms }), { unref() {} });
      const { logRefusal } = await import(process.argv[1]);
      const refuse = (status, count) => { while (count-- > 0) logRefusal({ log: "json", worker: 3 }, { status, peer: "192.0.2.1" }); };
      refuse("denied", 2000); refuse("busy", 31); refuse("bad_frame", 30);
      minutes[0].end();
      refuse("denied", 31);
      minutes[1].end();
      console.log(JSON.stringify(minutes.map(({ ms }) => ms)));
    `;
    const child = Bun.spawn([process.execPath, "-e", code, join(HOME, "log.ts")], {
      stdio: ["ignore", "pipe", "pipe"],
    });
    const [timers, errors] = await Promise.all([new Response(child.stdout).json(), new Response(child.stderr).text()]);
    expect(timers).toEqual([60_000, 60_000]);
    const lines = errors
      .trim()
      .split("\n")
      .map((line) => JSON.parse(line) as LogLine);
    const shown = lines.map(
      ({ event, status, count }) => `${event} ${status}${count === undefined ? "" : ` ${count}`}`,
    );
    expect(shown).toEqual([
      ...Array(30).fill("close denied"),
      ...Array(30).fill("close busy"),
      ...Array(30).fill("close bad_frame"),
      "refusals denied 1970",
      "refusals busy 1",
      ...Array(30).fill("close denied"),
      "refusals denied 1",
    ]);
    expect(lines.every(({ worker }) => worker === 3)).toBe(true);
  });
});
