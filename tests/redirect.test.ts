/**
 * A client among several servers: sent on in place of WELCOME or of an answer, it gets the right bytes of one version,
 * and a server that dies under it costs nothing that had come.
 */
import { describe, expect, setDefaultTimeout, test } from "bun:test";
import { existsSync, readdirSync, readFileSync, utimesSync, writeFileSync } from "node:fs";
import { networkInterfaces } from "node:os";
import { join } from "node:path";
import { parseServers, Remote } from "../client.ts";
import {
  DIRECT,
  EntriesEncoder,
  encodeEnd,
  encodeError,
  encodeFile,
  encodeInfo,
  encodeMeta,
  encodeRedirect,
  encodeSum,
  encodeWelcome,
  type Meta,
  RepriseError,
  type Request,
} from "../protocol.ts";
import { formatStatus } from "../terminal.ts";
import { authority, hasOpenssl, pair } from "./certificates.ts";
import {
  type Answering,
  contentFrames,
  type FakeServer,
  killHard,
  loggedIn,
  makeRoot,
  namesBelow,
  randomBytes,
  runClient,
  type Server,
  signal,
  sizeOf,
  spawnClient,
  spawnFedClient,
  startFakeServer,
  startServer,
  TEST_MS,
  temporaryFolder,
  treeOf,
  waitFor,
} from "./fixtures.ts";

setDefaultTimeout(TEST_MS);

const MIB = 1024 * 1024;
const HOST = "127.0.0.1";
/** Where nobody listens: of the ports that the kernel gives out, any may be another test's a moment later. */
const DEAD_PORT = 1;
const ONCE = ["--retries", "0"];
const isDirect = ({ flags }: { flags: number }) => (flags & DIRECT) !== 0;
const to = (port: number) => [encodeRedirect(HOST, port)];

/** Sends everybody on to the ports in turn, unless it is to answer itself. */
function startMaster(ports: () => number[], answer: Answering = () => [undefined]): FakeServer {
  let turn = 0;
  const greet = (hello: { flags: number }) => {
    const known = ports();
    return isDirect(hello) ? [encodeWelcome("master")] : to(known[turn++ % known.length]!);
  };
  return startFakeServer(answer, { greet });
}

/** Has nothing itself, and sends on to a port whoever asks for a file. */
function startSender(port: number | (() => number)): FakeServer {
  return startFakeServer((request) => {
    if (request.action === "quit") return [encodeEnd(0), undefined];
    if (request.action !== "get" && request.action !== "stat") return [encodeError(new RepriseError("refused"))];
    return to(typeof port === "number" ? port : port());
  });
}

const metaOf = (content: string, etag: string): Meta => ({ kind: "file", size: content.length, mtime: 1e15, etag });

/** Answers for files whose content the test makes up. */
function answerWith(contentOf: (path: string) => string, etag: string | ((path: string) => string) = "v1"): Answering {
  return (request) => {
    if (request.action !== "get" && request.action !== "stat") return [encodeError(new RepriseError("refused"))];
    const content = contentOf(request.path);
    const meta = metaOf(content, typeof etag === "string" ? etag : etag(request.path));
    if (request.action === "stat") return [encodeMeta(meta)];
    const { offset, length } = request;
    return [encodeMeta(meta, offset), ...contentFrames(content.slice(offset, offset + length))];
  };
}

const count = (server: FakeServer, action: Request["action"]) =>
  server.requests.filter((request) => request.action === action).length;
const closed = (server: FakeServer) => waitFor("its connections are closed", () => server.open() === 0);

// ---------------------------------------------------------------------------------------------------- direct

describe("direct", () => {
  const ask = async (server: FakeServer, direct?: boolean) => {
    const remote = new Remote({ servers: parseServers(server.address), retries: 0, ...(direct && { direct }) });
    try {
      return await remote.stat("f");
    } finally {
      remote.close();
    }
  };

  test("is said in HELLO, and only where it is wanted", async () => {
    using server = startFakeServer(answerWith(() => "x"));
    await ask(server);
    await ask(server, true);
    expect(server.hellos.map(isDirect)).toEqual([false, true]);
    await closed(server);
  });

  test("a server that sends on all the same does not keep to the protocol", async () => {
    using other = startFakeServer(answerWith(() => "x"));
    using server = startFakeServer(() => [], { greet: () => to(other.port) });
    expect(await ask(server).catch(({ code }) => code)).toMatchObject({ size: 1 });
    expect(await ask(server, true).catch(({ code }) => code)).toBe("bad_frame");
    expect(other.hellos.length).toBe(1);
  });

  test("whoever follows a redirect of HELLO does not say it, whoever follows one of an answer does", async () => {
    using holder = startFakeServer(answerWith(() => "x"));
    using replica = startSender(holder.port);
    using master = startMaster(() => [replica.port]);
    expect(await ask(master)).toMatchObject({ size: 1 });
    expect([master, replica, holder].map(({ hellos }) => hellos.map(isDirect))).toEqual([[false], [false], [true]]);
    for (const server of [master, replica, holder]) await closed(server);
  });
});

// ---------------------------------------------------------------------------------------------------- in place of an answer

describe("REDIRECT in place of an answer", () => {
  const big = randomBytes(5 * MIB + 3, 9);

  async function setUp() {
    const root = makeRoot({ big, small: "small\n", empty: "", "sub/one": "1", "sub/two": "2" });
    const folder = temporaryFolder();
    const holder = await startServer(root.path);
    const server = startSender(holder.port);
    return {
      root: root.path,
      folder: folder.path,
      holder,
      server,
      run: (...args: string[]) => runClient(server.address, args, { cwd: folder.path }),
      async [Symbol.asyncDispose]() {
        server[Symbol.dispose]();
        await holder[Symbol.asyncDispose]();
        root[Symbol.dispose]();
        folder[Symbol.dispose]();
      },
    };
  }

  test.each([
    ["big", []],
    ["small", []],
    ["empty", []],
    ["big", ["--segments", "4"]],
    ["big", ["--limit-rate", "40M"]],
  ])("get %s %j", async (name, args) => {
    await using it = await setUp();
    expect(await it.run("get", name, "-d", ".", ...args)).toMatchObject({ status: 0, errors: "" });
    expect(readFileSync(join(it.folder, name)).equals(readFileSync(join(it.root, name)))).toBe(true);
    expect(readdirSync(it.folder)).toEqual([name]);
    await closed(it.server);
  });

  test("stat, cat of several, and a file that is complete already: over one connection", async () => {
    await using it = await setUp();
    expect(JSON.parse((await it.run("stat", "big", "--json")).output)).toMatchObject({ size: big.length });
    const run = await it.run("cat", "big", "small", "empty", "small");
    expect([run.status, run.errors]).toEqual([0, ""]);
    expect(Buffer.from(run.stdout).equals(Buffer.concat([big, Buffer.from("small\nsmall\n")]))).toBe(true);
    expect(it.server.hellos.length).toBe(2);
    await it.run("get", "small", "-d", ".");
    expect((await it.run("get", "small", "-d", ".")).errors).toBe("small is complete already\n");
  });

  test("the prompt goes on with the connection that it has", async () => {
    await using it = await setUp();
    const stdin = "cat small\nstat small\nget small\ncat empty\nquit\n";
    const run = await runClient(it.server.address, ["-d", it.folder], { stdin });
    expect([run.status, run.errors]).toEqual([0, ""]);
    expect(run.output).toStartWith("small\n");
    expect(readFileSync(join(it.folder, "small"), "utf8")).toBe("small\n");
    expect(it.server.hellos.length).toBe(1);
    expect(count(it.server, "quit")).toBe(1);
  });

  test("a download that was cut goes on there at its offset", async () => {
    await using it = await setUp();
    await using slow = await startServer(it.root, { args: ["--limit-rate", "500K"] });
    const child = spawnClient(slow.address, ["get", "big", "-d", it.folder]);
    const log = join(it.folder, "big.resume.json");
    const held = () => loggedIn(log);
    await waitFor("bytes have come", () => held() > MIB / 2);
    child.kill("SIGKILL");
    await child.exited;
    const bytes = held();
    expect(await it.run("get", "big", "-d", ".")).toMatchObject({ status: 0, errors: "" });
    expect(readFileSync(join(it.folder, "big")).equals(big)).toBe(true);
    const [first] = it.server.requests.filter(({ action }) => action === "get");
    expect(first).toMatchObject({ offset: bytes });
    await waitFor("the holder has logged it", () => it.holder.log.some(({ offset }) => offset === bytes));
  });

  test("at a limited rate every stretch is asked there", async () => {
    using holder = startFakeServer(answerWith(() => "0123456789".repeat(2000)));
    using server = startSender(holder.port);
    const run = await runClient(server.address, ["cat", "f", "--limit-rate", "2000"]);
    expect(run).toMatchObject({ status: 0, errors: "", output: "0123456789".repeat(2000) });
    expect([count(server, "get"), count(holder, "get"), holder.hellos.length]).toEqual([1, 2, 1]);
  });
});

// ---------------------------------------------------------------------------------------------------- folders

/** Lists these files as the folder "d", and sends on to a port whoever asks for one; undefined: it is here. */
function startLister(files: Record<string, string>, portOf: (path: string) => number | undefined): FakeServer {
  return startFakeServer((request) => {
    if (request.action === "list") return listOf(files);
    if (request.action === "stat" && request.path === "d")
      return [encodeMeta({ kind: "folder", size: 0, mtime: 0, etag: "" })];
    const port = "path" in request ? portOf(request.path) : undefined;
    return port === undefined ? serveFile(files, request) : to(port);
  });
}

function listOf(files: Record<string, string>): Uint8Array[] {
  const encoder = new EntriesEncoder();
  const frames = Object.entries(files).flatMap(([path, content]) => {
    const { kind, size, mtime } = metaOf(content, "");
    return encoder.add({ path, kind, size, mtime }) ?? [];
  });
  const rest = encoder.rest();
  return [...frames, ...(rest ? [rest] : []), encodeEnd(Object.keys(files).length)];
}

/** Small ones whole, as a server does. */
function serveFile(files: Record<string, string>, request: Request): Uint8Array[] {
  if (request.action !== "get") return [encodeError(new RepriseError("refused"))];
  const content = files[request.path.slice("d/".length)]!;
  const meta = metaOf(content, `v1-${request.path}`);
  const { offset, length } = request;
  if (content.length < 1000) return [encodeFile(meta, Buffer.from(content))];
  return [encodeMeta(meta, offset), ...contentFrames(content.slice(offset, offset + length))];
}

describe("get -r and sync", () => {
  const COUNT = 600;
  const many = Object.fromEntries(Array.from({ length: COUNT }, (_, at) => [`f${at}`, `content of ${at}\n`]));
  const numberOf = (path: string) => Number(path.slice("d/f".length));
  const paths = (server: FakeServer) => server.requests.flatMap((it) => (it.action === "get" ? it.path : [])).sort();
  const expectAll = (folder: string, files: Record<string, string>) => {
    expect(readdirSync(folder).sort()).toEqual(Object.keys(files).sort());
    for (const [name, content] of Object.entries(files))
      if (readFileSync(join(folder, name), "utf8") !== content) throw new Error(`${name} has other content`);
  };

  const commands = { get: ["get", "-r", "d", "-o", "got"], sync: ["sync", "d", "got"] };
  test.each(Object.entries(commands))(
    `%s: some of ${COUNT} are elsewhere, each is asked for once, where it is`,
    async (_, args) => {
      using folder = temporaryFolder();
      using first = startFakeServer((request) => serveFile(many, request));
      using second = startFakeServer((request) => serveFile(many, request));
      const holders = [first, second, undefined, undefined, undefined];
      using server = startLister(many, (path) => holders[numberOf(path) % 5]?.port);
      expect((await runClient(server.address, args, { cwd: folder.path })).status).toBe(0);
      expectAll(join(folder.path, "got"), many);
      const all = Object.keys(many).map((name) => `d/${name}`);
      expect(paths(server)).toEqual(all.sort());
      expect(paths(first)).toEqual(all.filter((path) => numberOf(path) % 5 === 0));
      expect(paths(second)).toEqual(all.filter((path) => numberOf(path) % 5 === 1));
      // One for each of the two jobs.
      for (const { hellos } of [first, second]) {
        expect(hellos.length).toBeLessThanOrEqual(2);
        expect(hellos.every(isDirect)).toBe(true);
      }
      for (const one of [server, first, second]) await closed(one);
    },
  );

  test("what a holder sends on is asked for there", async () => {
    using folder = temporaryFolder();
    using last = startFakeServer((request) => serveFile(many, request));
    using middle = startLister(many, (path) => (numberOf(path) % 2 === 0 ? last.port : undefined));
    using server = startLister(many, (path) => (numberOf(path) % 3 === 0 ? middle.port : undefined));
    const run = await runClient(server.address, ["get", "-r", "d", "-o", "got"], { cwd: folder.path });
    expect(run).toMatchObject({ status: 0, errors: "" });
    expectAll(join(folder.path, "got"), many);
    expect([server, middle, last].map((one) => count(one, "get"))).toEqual([COUNT, COUNT / 3, COUNT / 6]);
    for (const one of [server, middle, last]) await closed(one);
  });

  test("a holder that dies is asked for nothing twice: what it has not answered is asked where it came from", async () => {
    using folder = temporaryFolder();
    const large = { ...many, big: "large ".repeat(500_000) };
    let answered = 0;
    using dying = startFakeServer((request) => {
      if (++answered <= 100) return serveFile(large, request);
      return [undefined];
    });
    using good = startFakeServer((request) => serveFile(large, request));
    const asked = new Map<string, number>();
    using server = startLister(large, (path) => {
      const times = (asked.get(path) ?? 0) + 1;
      asked.set(path, times);
      return path === "d/big" || numberOf(path) % 2 === 0 ? (times === 1 ? dying : good).port : undefined;
    });
    const run = await runClient(server.address, ["get", "-r", "d", "-o", "got", "--jobs", "1"], { cwd: folder.path });
    expect(run.status).toBe(0);
    expect(run.errors).toContain("asking elsewhere (1 of 10)");
    expectAll(join(folder.path, "got"), large);
    const twice = [...asked.values()].filter((times) => times > 1).length;
    expect(twice).toBe(COUNT / 2 + 1 - 100);
    expect(Math.max(...asked.values())).toBe(2);
    expect(count(good, "get")).toBe(twice);
    for (const one of [server, dying, good]) await closed(one);
  });

  test("a large file goes on at its offset with another holder, under its etag", async () => {
    using folder = temporaryFolder();
    const files = { big: "0123456789".repeat(300_000), small: "small" };
    let cuts = 0;
    const cutting: Answering = (request) => {
      const frames = serveFile(files, request);
      return request.action === "get" && ++cuts <= 3 ? [...frames.slice(0, 3), undefined] : frames;
    };
    using first = startFakeServer(cutting);
    using second = startFakeServer(cutting);
    let turn = 0;
    using server = startLister(files, (path) => (path === "d/big" ? [first, second][turn++ % 2]!.port : undefined));
    const run = await runClient(server.address, ["get", "-r", "d", "-o", "got"], { cwd: folder.path });
    expect(run.status).toBe(0);
    expectAll(join(folder.path, "got"), files);
    const gets = [first, second].flatMap(({ requests }) => requests) as { offset: number; etag: string }[];
    expect(gets.map(({ offset }) => offset).sort((a, b) => a - b)).toEqual([0, 1, 2, 3].map((at) => at * 512 * 1024));
    expect(new Set(gets.filter(({ offset }) => offset > 0).map(({ etag }) => etag))).toEqual(new Set(["v1-d/big"]));
    // The file that is here was asked for once, over a connection that none of it has cut.
    expect(count(server, "get")).toBe(5);
    expect(server.hellos.length).toBeLessThanOrEqual(3);
  });

  test("nobody is there: those files fail, each with its line, after all attempts; the others have come", async () => {
    using folder = temporaryFolder();
    const dead = DEAD_PORT;
    using server = startLister(many, (path) => (numberOf(path) % (COUNT / 2) === 7 ? dead : undefined));
    const args = ["get", "-r", "d", "-o", "got", "--retries", "2"];
    const run = await runClient(server.address, args, { cwd: folder.path });
    expect(run.status).toBe(8);
    expect(run.errors.match(/^error: .* \(given up after 2 retries\)$/gm)?.length).toBe(2);
    const { f7: _, f307: __, ...others } = many;
    expectAll(join(folder.path, "got"), others);
    // A job that comes late to one who is known to be dead has no attempts of its own.
    expect([2, 3, 4]).toContain(count(server, "get") - COUNT);
  });

  test("a holder that does not keep to the protocol ends it; a circle only costs the file", async () => {
    using folder = temporaryFolder();
    using liar = startFakeServer(() => [encodeEnd(7)]);
    using server = startLister(many, (path) => (numberOf(path) === 7 ? liar.port : undefined));
    const run = await runClient(server.address, ["get", "-r", "d", "-o", "lied"], { cwd: folder.path });
    expect([run.status, run.errors]).toEqual([9, expect.stringContaining("does not keep to the protocol")]);
    expect(existsSync(join(folder.path, "lied/f7"))).toBe(false);
    using self: FakeServer = startLister(many, (path) => (numberOf(path) === 7 ? self.port : undefined));
    const round = await runClient(self.address, ["get", "-r", "d", "-o", "round"], { cwd: folder.path });
    expect(round).toMatchObject({ status: 9, errors: `error: redirects in a circle, last to ${self.address}\n` });
    const { f7: _, ...others } = many;
    expectAll(join(folder.path, "round"), others);
  });

  test("SIGINT while a holder sends ends it, and the same command goes on", async () => {
    using folder = temporaryFolder();
    const files = { big: "0123456789".repeat(300_000) };
    using root = makeRoot({ "d/big": files.big });
    await using slow = await startServer(root.path, { args: ["--limit-rate", "300K"] });
    await using fast = await startServer(root.path);
    let { port } = slow;
    using server = startLister(files, () => port);
    const args = ["get", "-r", "d", "-d", folder.path];
    const child = spawnClient(server.address, args);
    const log = join(folder.path, "d/big.resume.json");
    const held = () => loggedIn(log);
    await waitFor("bytes have come", () => held() > 0);
    child.kill("SIGINT");
    expect(await child.exited).toBe(130);
    const bytes = held();
    port = fast.port;
    expect(await runClient(server.address, args)).toMatchObject({ status: 0, errors: "" });
    expect(server.requests.at(-1)).toMatchObject({ action: "get", offset: bytes });
    await waitFor("it is sent from there", () =>
      fast.log.some(({ event, offset }) => event === "get" && offset === bytes),
    );
    expectAll(join(folder.path, "d"), files);
  });
});

// ---------------------------------------------------------------------------------------------------- what is not followed

describe("what is not followed", () => {
  /** Servers that send on in a chain of so many redirects, the last of them to `port`. */
  function startChain(length: number, port: number) {
    const servers: FakeServer[] = [];
    let next = port;
    for (let at = 0; at < length; at++) {
      const server = startSender(next);
      servers.push(server);
      next = server.port;
    }
    return {
      servers,
      address: `${HOST}:${next}`,
      [Symbol.dispose]() {
        for (const server of servers) server[Symbol.dispose]();
      },
    };
  }

  test.each([
    [1, 0],
    [5, 0],
    [6, 9],
  ])("a chain of %d redirects: status %d", async (length, status) => {
    using folder = temporaryFolder();
    using holder = startFakeServer(answerWith(() => "there"));
    using chain = startChain(length, holder.port);
    const commands = [
      ["cat", "f"],
      ["stat", "f"],
      ["get", "f", "-d", folder.path],
      ["get", "f", "-d", folder.path, "--segments", "2"],
    ];
    for (const args of commands) {
      const run = await runClient(chain.address, [...args, ...ONCE]);
      expect([args, run.status]).toEqual([args, status]);
      // By the last of them the file is there.
      const said = args.includes("--segments") ? `${join(folder.path, "f")} is complete already\n` : "";
      expect(run.errors).toBe(status === 0 ? said : `error: more than 5 redirects, last to ${holder.address}\n`);
    }
    expect(existsSync(join(folder.path, "f"))).toBe(status === 0);
    expect(readdirSync(folder.path)).toEqual(status === 0 ? ["f"] : []);
    expect(holder.hellos.length > 0).toBe(status === 0);
    for (const server of chain.servers) await closed(server);
  });

  test.each([1, 2, 3])("a circle of %d servers", async (length) => {
    let first = 0;
    using end = startSender(() => first);
    using chain = startChain(length - 1, end.port);
    first = Number(chain.address.split(":")[1]);
    const run = await runClient(chain.address, ["cat", "f", ...ONCE]);
    expect(run).toMatchObject({ status: 9, output: "" });
    expect(run.errors).toBe(`error: redirects in a circle, last to ${chain.address}\n`);
    for (const server of [end, ...chain.servers]) expect(count(server, "get")).toBe(1);
  });

  test("a circle that ends is none: servers may disagree for a moment", async () => {
    using holder = startFakeServer(answerWith(() => "there"));
    let times = 0;
    using server: FakeServer = startSender(() => (++times < 3 ? server.port : holder.port));
    expect(await runClient(server.address, ["cat", "f"])).toMatchObject({ status: 0, output: "there" });
  });

  test("whoever sent the client by HELLO may be the one who has it", async () => {
    using replica = startSender(() => master.port);
    using master: FakeServer = startMaster(
      () => [replica.port],
      answerWith(() => "there"),
    );
    expect(await runClient(master.address, ["cat", "f", ...ONCE])).toMatchObject({ status: 0, output: "there" });
    expect(master.hellos.map(isDirect)).toEqual([false, true]);
  });

  test("to nobody: tried as often as --retries says, each time by way of the server that was named", async () => {
    using folder = temporaryFolder();
    using server = startSender(DEAD_PORT);
    const run = await runClient(server.address, ["get", "f", "-d", folder.path, "--retries", "2"]);
    expect(run.status).toBe(8);
    expect(run.errors).toContain("nothing listens there (given up after 2 retries)");
    expect(run.errors).not.toContain("trying again in");
    expect([server.hellos.length, readdirSync(folder.path)]).toEqual([3, []]);
  });

  test("to one who is silent: ends by --timeout", async () => {
    using silent = startFakeServer(() => [], { greet: () => [] });
    using server = startSender(silent.port);
    const run = await runClient(server.address, ["cat", "f", ...ONCE, "--timeout", "0.3"]);
    expect([run.status, run.errors]).toEqual([8, "error: no byte for 0.3 s\n"]);
    for (const one of [server, silent]) await closed(one);
  });

  test("SIGINT ends the wait for one who is silent", async () => {
    using silent = startFakeServer(() => []);
    using server = startSender(silent.port);
    const child = spawnClient(server.address, ["cat", "f"]);
    await waitFor("it is asked", () => silent.requests.length > 0);
    child.kill("SIGINT");
    expect(await child.exited).toBe(130);
    await closed(silent);
  });

  const requests: [string, string[], string | undefined][] = [
    ["LIST", ["ls"], undefined],
    ["REMOVE", ["rm", "f"], undefined],
    ["MKDIR", ["mkdir", "f"], undefined],
    ["STATUS", ["status"], undefined],
    ["MOVE", ["mv", "a", "b"], undefined],
    ["PUT", ["put", "-", "-t", "f"], "content"],
  ];
  test.each(requests)("in place of the answer to %s", async (_, args, stdin) => {
    using trap = startFakeServer(() => [encodeEnd(0)]);
    using server = startFakeServer((request) =>
      request.action === "stat" ? [encodeError(new RepriseError("not_found"))] : to(trap.port),
    );
    const options = stdin === undefined ? {} : { stdin };
    const run = await runClient(server.address, [...args, ...ONCE], options);
    expect([run.status, run.errors]).toEqual([9, expect.stringContaining("redirect in place of")]);
    expect(trap.hellos.length).toBe(0);
  });

  describe("to other content", () => {
    const before = "b".repeat(6 * MIB);
    const after = "a".repeat(6 * MIB);

    /** Gives out the file to its half, and then sends on to a port. */
    function startHalf(port: number): FakeServer {
      let times = 0;
      return startFakeServer((request) => {
        if (request.action === "stat") return [encodeMeta(metaOf(before, "before"))];
        if (request.action !== "get") return [encodeEnd(0), undefined];
        if (++times > 1) return to(port);
        const frames = contentFrames(before);
        return [encodeMeta(metaOf(before, "before"), 0), ...frames.slice(0, 12), undefined];
      });
    }

    test.each([
      ["get", ["get", "f", "-d", "."]],
      ["cat", ["cat", "f"]],
    ])("%s goes on with no other version", async (_, args) => {
      using folder = temporaryFolder();
      using holder = startFakeServer(answerWith(() => after, "after"));
      using server = startHalf(holder.port);
      const run = await runClient(server.address, args, { cwd: folder.path });
      expect([run.status, run.errors]).toEqual([9, expect.stringContaining("another part than was asked for")]);
      expect(run.output.includes("a")).toBe(false);
      expect(existsSync(join(folder.path, "f"))).toBe(false);
      expect(holder.requests).toMatchObject([{ offset: 3 * MIB, etag: "before" }]);
    });

    test("one who says that it has changed is believed: a file starts again, a stream ends", async () => {
      using folder = temporaryFolder();
      const other = answerWith(() => after, "after");
      using holder = startFakeServer((request, connection) =>
        request.action === "get" && request.etag === "before"
          ? [encodeError(new RepriseError("changed"))]
          : other(request, connection),
      );
      using first = startHalf(holder.port);
      expect(await runClient(first.address, ["get", "f", "-d", folder.path])).toMatchObject({ status: 0 });
      expect(readFileSync(join(folder.path, "f"), "utf8") === after).toBe(true);
      using second = startHalf(holder.port);
      const run = await runClient(second.address, ["cat", "f"]);
      expect([run.status, run.output === "b".repeat(3 * MIB)]).toEqual([5, true]);
    });

    test("segments of two versions make no file", async () => {
      using folder = temporaryFolder();
      using holder = startFakeServer(answerWith(() => after, "after"));
      const own = answerWith(() => before, "before");
      using server = startFakeServer((request, connection) =>
        request.action === "get" && request.offset > 0 ? to(holder.port) : own(request, connection),
      );
      const args = ["get", "f", "-d", folder.path, "--segments", "3"];
      const run = await runClient(server.address, args);
      expect([run.status, run.errors]).toEqual([9, expect.stringContaining("another part than was asked for")]);
      expect(existsSync(join(folder.path, "f"))).toBe(false);
    });
  });
});

// ---------------------------------------------------------------------------------------------------- who is trusted

describe("who is trusted", () => {
  test.skipIf(!hasOpenssl)("TLS goes on as TLS, and never to who does not speak it", async () => {
    using root = makeRoot({ f: "secret" });
    const { cert, key, args } = pair("good");
    const tls = { cert: readFileSync(cert, "utf8"), key: readFileSync(key, "utf8") };
    await using holder = await startServer(root.path, { args });
    const ca = ["--ca", authority()];
    using server = startFakeServer(() => to(holder.port), { tls });
    const run = await runClient(`tls://${server.address}`, ["cat", "f", ...ca, ...ONCE]);
    expect(run).toMatchObject({ status: 0, output: "secret", errors: "" });
    using clear = startFakeServer(answerWith(() => "forged"));
    using other = startFakeServer(() => to(clear.port), { tls });
    expect((await runClient(`tls://${other.address}`, ["cat", "f", ...ca, ...ONCE, "--timeout", "1"])).output).toBe("");
    expect(clear.hellos.length).toBe(0);
  });

  const outside = Object.values(networkInterfaces())
    .flat()
    .find((it) => it && !it.internal && it.family === "IPv4")?.address;
  if (!outside) console.log("skipped: this machine has no address but loopback, so that no token can leave it");

  test.skipIf(!outside)("a token goes on within this machine, and not in clear beyond loopback", async () => {
    const tokens: string[] = [];
    const listener = Bun.listen({
      hostname: "0.0.0.0",
      port: 0,
      socket: { data: (_, bytes) => void tokens.push(bytes.toString("latin1")), error() {} },
    });
    using near = startFakeServer(answerWith(() => "here"));
    const env = { REPRISE_TOKEN: "rprs_the-token" };
    using good = startSender(near.port);
    expect((await runClient(good.address, ["cat", "f", ...ONCE], { env })).output).toBe("here");
    expect(near.hellos.map(({ token }) => token)).toEqual(["rprs_the-token"]);
    using server = startFakeServer(() => [encodeRedirect(outside!, listener.port)]);
    const run = await runClient(server.address, ["cat", "f", ...ONCE, "--timeout", "10"], { env });
    listener.stop(true);
    expect([run.status, run.errors]).toEqual([
      4,
      expect.stringContaining("no token is sent in clear to another machine"),
    ]);
    expect(tokens).toEqual([]);
  });
});

// ---------------------------------------------------------------------------------------------------- failover

/** To all that it runs. One that has gone needs none. */
function signalAll(server: Server, name: NodeJS.Signals): void {
  for (const pid of [server.process.pid, ...server.workers()]) signal(pid, name);
}

/** As a machine that loses its power: nothing is said, and nobody takes its place. */
function kill(server: Server): void {
  const workers = server.workers();
  server.process.kill("SIGKILL");
  for (const pid of workers) killHard(pid);
}

/**
 * A master that sends to one replica after the other, each a server of its own on the same root: by inode and times a
 * file has the same etag at all of them.
 */
async function startCluster(root: string, size: number, args: string[]) {
  const replicas: Server[] = [];
  const add = async (more = args) => replicas.push(await startServer(root, { args: ["--writable", ...more] }));
  for (let at = 0; at < size; at++) await add();
  let named: Server[] | undefined;
  const master = startMaster(() => (named ?? replicas).map(({ port }) => port));
  return {
    replicas,
    master,
    address: master.address,
    /** These are sent to, in place of all. */
    name(...servers: Server[]) {
      named = servers;
    },
    /** One takes the place of the oldest, which dies; the master hears of it at once. Nothing comes meanwhile. */
    async replace(more = args) {
      const [oldest, ...others] = replicas;
      for (const server of replicas) signalAll(server, "SIGSTOP");
      await add(more);
      for (const server of others) signalAll(server, "SIGCONT");
      replicas.shift();
      kill(oldest!);
      await oldest![Symbol.asyncDispose]();
    },
    async [Symbol.asyncDispose]() {
      master[Symbol.dispose]();
      await Promise.all(replicas.map((server) => server[Symbol.asyncDispose]()));
    },
  };
}

describe("a replica dies", () => {
  const big = randomBytes(24 * MIB + 5, 4);
  const KILLS = 20;
  const heldBytes = (file: string) => loggedIn(`${file}.resume.json`);

  test.each([
    ["get", ["get", "big"]],
    ["get --segments", ["get", "big", "--segments", "3"]],
    ["get -r", ["get", "-r", "/"]],
    ["cat", ["cat", "big"]],
  ])(`${KILLS} times in the middle of one %s: it goes on by itself, and no byte is wrong`, async (name, args) => {
    using root = makeRoot({ big });
    using folder = temporaryFolder();
    // Slow enough that it is not done before it was cut so often; the last ones are as fast as they can be.
    const [size, rate] = args.includes("--segments") ? [2, "250K"] : [1, "600K"];
    await using cluster = await startCluster(root.path, size, ["--limit-rate", rate]);
    const child = spawnClient(cluster.address, [...args, ...(name === "cat" ? [] : ["-d", folder.path])]);
    const errors = new Response(child.stderr).text();
    const chunks: Uint8Array[] = [];
    let piped = 0;
    const reading = (async () => {
      for await (const chunk of child.stdout) {
        chunks.push(chunk);
        piped += chunk.length;
      }
    })();
    const file = join(folder.path, "big");
    let kills = 0;
    for (let before = 0; kills < KILLS; kills++) {
      const come = () => (name === "cat" ? piped : heldBytes(file));
      before = await waitFor("bytes have come", () => (come() > before || child.exitCode !== null ? come() || 1 : 0));
      for (let at = 0; at < (kills < KILLS - 1 ? 1 : size); at++)
        await cluster.replace(kills < KILLS - 1 ? undefined : []);
      if (child.exitCode !== null) break;
    }
    expect([await child.exited, kills]).toEqual([0, KILLS]);
    await reading;
    const got = name === "cat" ? Buffer.concat(chunks) : readFileSync(file);
    expect(got.equals(big)).toBe(true);
    expect(await errors).not.toContain("starting again");
    expect((await errors).split("again").length - 1).toBeGreaterThan(KILLS / 2);
    expect(readdirSync(folder.path)).toEqual(name === "cat" ? [] : ["big"]);
  });

  test("the master names the dead one for a while: it is asked again at once, and then waited for", async () => {
    using root = makeRoot({ big });
    // Slow enough that it is not done before the first dies.
    await using cluster = await startCluster(root.path, 1, ["--limit-rate", "1M"]);
    await using second = await startServer(root.path);
    const [first] = cluster.replicas as [Server];
    cluster.name(first);
    const child = spawnClient(cluster.address, ["cat", "big"]);
    const errors = new Response(child.stderr).text();
    const output = new Response(child.stdout).bytes();
    await waitFor("it is being sent", () => cluster.master.hellos.length > 0);
    await waitFor("a connection is there", async () => (await runStatus(first)).connections > 0);
    kill(first);
    await waitFor("it was asked again a few times", () => cluster.master.hellos.length >= 6);
    cluster.name(second);
    expect(await child.exited).toBe(0);
    expect(Buffer.from(await output).equals(big)).toBe(true);
    const lines = (await errors).trim().split("\n");
    expect(lines.filter((line) => line.includes(`asking ${cluster.address} again`)).length).toBe(4);
    expect(lines.filter((line) => line.includes("trying again in")).length).toBeGreaterThanOrEqual(1);
  });

  const runStatus = async (server: Server) =>
    JSON.parse((await runClient(server.address, ["status", "--json"])).output);

  test("and no other comes: given up after --retries, which were counted from the first", async () => {
    using root = makeRoot({ big });
    await using cluster = await startCluster(root.path, 1, []);
    kill(cluster.replicas[0]!);
    const run = await runClient(cluster.address, ["cat", "big", "--retries", "6"]);
    expect([run.status, cluster.master.hellos.length]).toEqual([8, 7]);
    expect([...run.errors.matchAll(/again \(\d of 6\)/g)].map(String)).toEqual(
      [1, 2, 3, 4].map((at) => `again (${at} of 6)`),
    );
    expect(run.errors.match(/trying again in 0\.[1-5] s \(\d of 6\)/g)?.length).toBe(2);
  });

  test("who has the newest version dies: the client asks the server that was named, not who sent it there", async () => {
    using root = makeRoot({ big });
    await using holder = await startServer(root.path, { args: ["--limit-rate", "1M"] });
    await using other = await startServer(root.path);
    using sender = startSender(holder.port);
    let ports = [sender.port];
    using master = startMaster(() => ports);
    const child = spawnClient(master.address, ["cat", "big"]);
    const output = new Response(child.stdout).bytes();
    await waitFor("it is sent there", () => sender.requests.length > 0);
    await waitFor("a connection is there", async () => (await runStatus(holder)).connections > 0);
    ports = [other.port];
    kill(holder);
    expect(await child.exited).toBe(0);
    expect(Buffer.from(await output).equals(big)).toBe(true);
    expect(count(sender, "get")).toBe(1);
  });

  test.each([
    ["a dead server and a cluster", true],
    ["a master whose only replica is dead, and a server", false],
  ])("--server a,b: %s", async (_, isDead) => {
    using root = makeRoot({ small: "content" });
    await using server = await startServer(root.path);
    const dead = DEAD_PORT;
    using first = startMaster(() => [dead]);
    using second = startMaster(() => [server.port]);
    const servers = isDead ? `${HOST}:${dead},${second.address}` : `${first.address},${second.address}`;
    const run = await runClient(servers, ["cat", "small"]);
    expect(run).toMatchObject({ status: 0, output: "content" });
    expect(first.hellos.length).toBe(isDead ? 0 : 5);
    if (isDead) expect(run.errors).toBe("");
  });

  describe("in the middle of an upload", () => {
    /** Two replicas that share nothing; the first dies once it has some of what comes. */
    async function upload(content: Uint8Array, fed: boolean) {
      using folder = temporaryFolder();
      using firstRoot = makeRoot({});
      using secondRoot = makeRoot({});
      const file = join(folder.path, "file");
      writeFileSync(file, content);
      // Of a file so slowly that it is not whole before; of standard input the end is still to come.
      const slow = fed ? [] : ["--limit-rate", "1M"];
      await using first = await startServer(firstRoot.path, { args: ["--writable", ...slow] });
      await using second = await startServer(secondRoot.path, { args: ["--writable"] });
      let ports = [first.port];
      using master = startMaster(() => ports);
      const uploads = join(firstRoot.path, ".reprise");
      const child = fed
        ? spawnFedClient(master.address, ["put", "-", "-t", "put"])
        : spawnClient(master.address, ["put", file, "-t", "put", "-d", folder.path]);
      const errors = new Response(child.stderr).text();
      if (fed) await feed(child.stdin as FileSink, content);
      await waitFor("some of it is there", () => bytesIn(uploads) > MIB);
      ports = [second.port];
      kill(first);
      if (fed) await (child.stdin as FileSink).end();
      const status = await child.exited;
      const path = join(secondRoot.path, "put");
      const isRight = existsSync(path) && readFileSync(path).equals(content);
      return { status, errors: await errors, isRight, isThere: existsSync(path), second: second.address };
    }

    type FileSink = { write(bytes: Uint8Array): number; flush(): number | Promise<number>; end(): unknown };
    /** All of it, while the end is still to come. */
    async function feed(stdin: FileSink, content: Uint8Array): Promise<void> {
      stdin.write(content);
      await stdin.flush();
    }

    function bytesIn(folder: string): number {
      return namesBelow(folder).reduce((sum, name) => sum + sizeOf(join(folder, name)), 0);
    }

    test("of a file: it is sent from its start to another, and that is said", async () => {
      const run = await upload(big, false);
      expect([run.status, run.isRight]).toEqual([0, true]);
      expect(run.errors).toContain(`warn: ${run.second} holds 0 of the `);
    });

    test("of standard input, as much as is kept of it: the same", async () => {
      const run = await upload(big, true);
      expect([run.status, run.isRight]).toEqual([0, true]);
      expect(run.errors).toContain(`warn: ${run.second} holds 0 of the `);
    });

    test("of more than that: it is said that it cannot be sent again, and nothing has the name", async () => {
      const run = await upload(randomBytes(48 * MIB, 5), true);
      expect([run.status, run.isThere]).toEqual([7, false]);
      expect(run.errors).toContain("error: standard input cannot be read again from byte 0, which the server has lost");
    });
  });
});

// ---------------------------------------------------------------------------------------------------- changes

describe("changes in a cluster", () => {
  test("ls, put, rm, mv and mkdir go to the replica that they are sent to", async () => {
    using root = makeRoot({ "sub/f": "f" });
    using folder = temporaryFolder();
    writeFileSync(join(folder.path, "new"), "new");
    await using cluster = await startCluster(root.path, 2, []);
    const run = async (...args: string[]) => {
      const ran = await runClient(cluster.address, args, { cwd: folder.path });
      expect([args, ran.status, ran.errors]).toEqual([args, 0, ""]);
      return ran.output;
    };
    await run("put", "new", "-t", "sub/");
    await run("mkdir", "-p", "deep/er");
    await run("mv", "sub/new", "deep/");
    await run("rm", "sub/f");
    expect(await run("ls", "-r")).toBe("deep/\ndeep/er/\ndeep/new\nsub/\n");
    await run("put", "-r", "new", "-t", "sub");
    expect(treeOf(root.path).map((line) => line.split(" ")[0]!)).toEqual([
      "deep",
      "deep/er",
      "deep/new",
      "sub",
      "sub/new",
    ]);
    const wasAsked = ({ log }: Server) => log.some(({ event }) => event !== "start");
    await waitFor("both were asked", () => cluster.replicas.every(wasAsked));
  });

  /**
   * A replica that loses its connection once it has taken a change, all of it: who knows that it has not sent all need not
   * ask whether it is there. What it then has is said by `after`.
   */
  function startForgetful(after: Answering): FakeServer {
    let isTaken = false;
    return startFakeServer(
      (request, connection) => {
        if (isTaken) return after(request, connection);
        if (request.action === "stat") return [encodeError(new RepriseError("not_found"))];
        isTaken = true;
        return [undefined];
      },
      { takesAll: true },
    );
  }

  test("a move whose answer was lost is done when its new name is there, be it at another", async () => {
    using server = startForgetful((request) =>
      request.action === "stat" ? to(DEAD_PORT) : [encodeError(new RepriseError("not_found"))],
    );
    expect(await runClient(server.address, ["mv", "a", "b"])).toMatchObject({ status: 0 });
    expect(server.requests.at(-1)).toEqual({ action: "stat", path: "b" });
  });

  test.each([
    ["is there, at another: it is not sent again", true],
    ["may be at another, who is dead: it is sent again", false],
  ])("an upload whose answer was lost, and which %s", async (_, isThere) => {
    using folder = temporaryFolder();
    const content = "of the upload";
    const file = join(folder.path, "f");
    writeFileSync(file, content);
    const meta = metaOf(content, "v1");
    utimesSync(file, meta.mtime / 1e6, meta.mtime / 1e6);
    using holder = startFakeServer((request) =>
      request.action === "stat"
        ? [encodeMeta(meta)]
        : [encodeSum(content.length, Bun.hash.crc32(content)), encodeEnd(content.length)],
    );
    const port = isThere ? holder.port : DEAD_PORT;
    using server = startForgetful((request) => (request.action === "stat" ? to(port) : [encodeMeta(meta)]));
    const run = await runClient(server.address, ["put", file, "--json"]);
    expect([run.status, JSON.parse(run.output)]).toMatchObject([0, { path: "f", etag: "v1" }]);
    expect(count(server, "put")).toBe(isThere ? 1 : 2);
    expect(holder.requests.map(({ action }) => action)).toEqual(isThere ? ["stat", "sums"] : []);
  });
});

// ---------------------------------------------------------------------------------------------------- status

describe("status", () => {
  const info = {
    server: "reprise 0.1.0",
    role: "master",
    node: "0123abcd",
    revision: 1234,
    workers: 2,
    replicas: [
      { node: "a1", address: "127.0.0.1:2122", state: "live", revision: 1234, lag: 0 },
      { node: "b2", address: "[2001:db8::7]:2123", state: "gone", revision: 7, lag: 1227, problem: "no room" },
    ],
  };

  test("is that of the server that was named, which says DIRECT; for a person a table", async () => {
    using replica = startFakeServer(() => [encodeInfo({ server: "the wrong one" })]);
    using master = startMaster(
      () => [replica.port],
      () => [encodeInfo(info)],
    );
    expect(await runClient(master.address, ["status"])).toMatchObject({
      status: 0,
      errors: "",
      output: [
        "server    reprise 0.1.0",
        "role      master",
        "node      0123abcd",
        "revision  1234",
        "workers   2",
        "replicas  2",
        "",
        "address             state  revision   lag  problem",
        "127.0.0.1:2122      live       1234     0",
        "[2001:db8::7]:2123  gone          7  1227  no room",
        "",
      ].join("\n"),
    });
    const json = await runClient(master.address, ["status", "--json"]);
    expect([JSON.parse(json.output), json.output.split("\n").length]).toEqual([info, 2]);
    const prompt = await runClient(master.address, [], { stdin: "status\nquit\n" });
    expect(prompt.output).toContain("[2001:db8::7]:2123  gone          7  1227  no room\n");
    expect([master.hellos.map(isDirect), replica.hellos.length]).toEqual([[true, true, true], 0]);
    await closed(master);
  });

  test.each([
    ["no replicas", { server: "s", replicas: [] }, "server    s\nreplicas  none"],
    ["only their number", { server: "s", replicas: 3 }, "server    s\nreplicas  3"],
    ["nothing of it", { server: "s", uptime: 7 }, "server  s\nuptime  7"],
    ["what is no table", { replicas: ["a", "b"] }, "replicas  a, b"],
    ["nulls", { replicas: [null] }, "replicas  null"],
  ])("of a server that says %s", (_, said, shown) => {
    expect(formatStatus(said)).toBe(shown);
  });

  test("a replica without some of it, or with what a terminal would obey", () => {
    const shown = formatStatus({ replicas: [{ address: "a\x1b[2J\nb", lag: { deep: 1 } }, {}] });
    expect(shown.split("\n").length).toBe(5);
    expect(shown.replaceAll("\n", "")).not.toMatch(/\p{Cc}/u);
    expect(shown).toContain('{"deep":1}');
  });
});
