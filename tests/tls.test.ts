/**
 * TLS: everything that works in plain works as well, resumed and cut; each way in which a certificate can be wrong has
 * its words and tells nobody anything; new certificates come with SIGHUP; peers that are slow at it cost little.
 */
import { afterAll, beforeAll, describe, expect, setDefaultTimeout, test } from "bun:test";
import { X509Certificate } from "node:crypto";
import {
  appendFileSync,
  copyFileSync,
  existsSync,
  readdirSync,
  readFileSync,
  readlinkSync,
  rmSync,
  truncateSync,
  writeFileSync,
} from "node:fs";
import { connect, createServer, type Socket as NetSocket } from "node:net";
import { join } from "node:path";
import { connect as connectTls, createServer as createTlsServer, type TLSSocket } from "node:tls";
import { Remote } from "../client.ts";
import { encodeHello, encodeRequest, MAX_CONTENT_BYTES, TO_THE_END } from "../protocol.ts";
import { authority, hasOpenssl, type Pair, pair, pairOf } from "./certificates.ts";
import { type ProxyOptions, startProxy } from "./faults/proxy.ts";
import {
  type ClientOptions,
  connectRaw,
  freePort,
  HOME,
  killWorkers,
  type LogLine,
  makeRoot,
  namesBelow,
  peakResidentBytes,
  randomBytes,
  readResumeLog,
  residentBytes,
  runClient,
  type Server,
  sha256,
  sizeOf,
  spawnClient,
  spawnFedClient,
  startServer,
  TEST_MS,
  temporaryFolder,
  treeOf,
  waitFor,
  writeLargeFile,
  writeTree,
} from "./fixtures.ts";

setDefaultTimeout(TEST_MS);
if (!hasOpenssl) console.log("skipped: the tests of TLS make their certificates with openssl");
const describeTls = describe.skipIf(!hasOpenssl);

interface Place extends AsyncDisposable {
  root: string;
  server: Server;
  /** Of the client: what it gets, and its logs. */
  folder: string;
  /** Runs a client that trusts the test's root. */
  run(...args: string[]): ReturnType<typeof runClient>;
  feed(stdin: string | Uint8Array, ...args: string[]): ReturnType<typeof runClient>;
  spawn(...args: string[]): ReturnType<typeof spawnClient>;
}

/** A writable server that shows the good certificate. */
async function setUp(args: string[] = []): Promise<Place> {
  const root = temporaryFolder();
  const folder = temporaryFolder();
  const server = await startServer(root.path, { args: ["--writable", ...pair("good").args, ...args] });
  const trusting = (args: string[]) => [...args, "--ca", authority()];
  const options: ClientOptions = { cwd: folder.path };
  return {
    root: root.path,
    server,
    folder: folder.path,
    run: (...args) => runClient(server.address, trusting(args), options),
    feed: (stdin, ...args) => runClient(server.address, trusting(args), { ...options, stdin }),
    spawn: (...args) => spawnClient(server.address, trusting(args), options),
    async [Symbol.asyncDispose]() {
      await server[Symbol.asyncDispose]();
      root[Symbol.dispose]();
      folder[Symbol.dispose]();
    },
  };
}

const got = (it: Place, name: string) => join(it.folder, "client_root", name);
const ofEvent = (server: Server, event: string) => server.log.filter((line) => line.event === event);
const done = { status: 0 };

function remoteOf(server: Server, options = {}): Remote {
  const ca = readFileSync(authority(), "utf8");
  return new Remote({ servers: [{ host: "127.0.0.1", port: server.port, tls: true }], ca, ...options });
}

describeTls("what works in plain works over TLS", () => {
  let it: Place;
  beforeAll(async () => {
    it = await setUp();
  });
  afterAll(() => it[Symbol.asyncDispose]());

  test("the first line on stdout says so", () => expect(it.server.address).toMatch(/^tls:\/\/127\.0\.0\.1:\d+$/));

  test("get, cat, stat, ls, put, put -, mv, rm, mkdir and patterns", async () => {
    writeTree(it.root, { "few/a.txt": "a", "few/b.txt": "b", "few/c.bin": "c", "few/deep/d.txt": "d" });
    expect(await it.run("cat", "few/*.txt")).toMatchObject({ ...done, output: "ab" });
    expect(await it.run("get", "few/**/*.txt", "-d", "patterns")).toMatchObject(done);
    expect(readdirSync(join(it.folder, "patterns")).sort()).toEqual(["a.txt", "b.txt", "d.txt"]);
    expect((await it.run("ls", "few", "-r")).output.trim().split("\n").sort()).toEqual(
      ["a.txt", "b.txt", "c.bin", "deep/", "deep/d.txt"].sort(),
    );
    expect(JSON.parse((await it.run("stat", "few/c.bin", "--json")).output)).toMatchObject({ size: 1 });
    expect(await it.feed("from a pipe", "put", "-", "-t", "few/piped")).toMatchObject(done);
    expect(await it.run("mkdir", "-p", "few/new/folder")).toMatchObject(done);
    expect(await it.run("mv", "few/piped", "few/new/moved")).toMatchObject(done);
    expect(await it.run("rm", "few/b.txt")).toMatchObject(done);
    writeFileSync(join(it.folder, "put.txt"), "put");
    expect(await it.run("put", "put.txt", "-t", "few/new/folder/")).toMatchObject(done);
    expect(readFileSync(join(it.root, "few/new/moved"), "utf8")).toBe("from a pipe");
    expect(readFileSync(join(it.root, "few/new/folder/put.txt"), "utf8")).toBe("put");
    expect(existsSync(join(it.root, "few/b.txt"))).toBe(false);
    expect(await it.run("cat", "few/b.txt")).toMatchObject({ status: 3 });
  });

  const edges = [0, 1, 16_384, MAX_CONTENT_BYTES - 1, MAX_CONTENT_BYTES, MAX_CONTENT_BYTES + 1, 10 << 20];
  test(`files of ${edges.join(", ")} bytes, there and back`, async () => {
    const names = edges.map((size) => `edge${size}`);
    for (const [index, name] of names.entries())
      writeFileSync(join(it.folder, name), randomBytes(edges[index]!, index + 2));
    expect(await it.run("put", ...names)).toMatchObject(done);
    expect(await it.run("get", ...names)).toMatchObject(done);
    for (const name of names) {
      expect(readFileSync(join(it.root, name)).equals(readFileSync(join(it.folder, name)))).toBe(true);
      expect(readFileSync(got(it, name)).equals(readFileSync(join(it.folder, name)))).toBe(true);
    }
  });

  test("100 MB there and back, in segments too, in little memory on both sides", async () => {
    const digest = writeLargeFile(join(it.folder, "large"), 100 << 20);
    const putting = it.spawn("put", "large");
    const [putPeak] = await Promise.all([peakResidentBytes(putting.pid), putting.exited]);
    expect(await sha256(join(it.root, "large"))).toBe(digest);
    const getting = it.spawn("get", "large");
    const [getPeak] = await Promise.all([peakResidentBytes(getting.pid), getting.exited]);
    expect([putting.exitCode, getting.exitCode]).toEqual([0, 0]);
    expect(await sha256(got(it, "large"))).toBe(digest);
    expect(await it.run("get", "large", "-d", "cut", "--segments", "4")).toMatchObject(done);
    expect(await sha256(join(it.folder, "cut/large"))).toBe(digest);
    await waitFor("all segments are logged", () => {
      const offsets = ofEvent(it.server, "get").filter(({ path }) => path === "large");
      return new Set(offsets.map(({ offset }) => offset)).size === 4;
    });
    expect(Math.max(putPeak, getPeak)).toBeLessThan(150e6);
    for (const pid of it.server.workers()) expect(await residentBytes(pid)).toBeLessThan(200e6);
    for (const name of ["large", "cut/large", "client_root/large"]) rmSync(join(it.folder, name));
    rmSync(join(it.root, "large"));
  });

  test("500 small files: put -r, get -r, sync down and up, of which only what differs is sent", async () => {
    const files = Array.from({ length: 500 }, (_, index) => [
      `f${index % 20}/${index}`,
      randomBytes(4 * index, index + 1),
    ]);
    writeTree(join(it.folder, "many"), Object.fromEntries(files));
    expect(await it.run("put", "-r", "many")).toMatchObject(done);
    expect(treeOf(join(it.root, "many"))).toEqual(treeOf(join(it.folder, "many")));
    expect(await it.run("get", "-r", "many")).toMatchObject(done);
    expect(treeOf(got(it, "many"))).toEqual(treeOf(join(it.folder, "many")));
    expect(await it.run("sync", "many", "copy")).toMatchObject(done);
    expect(treeOf(join(it.folder, "copy"))).toEqual(treeOf(join(it.folder, "many")));
    writeTree(join(it.folder, "copy"), { "f0/0": "another", "f1/new": "new" });
    rmSync(join(it.folder, "copy/f2"), { recursive: true });
    const puts = () => ofEvent(it.server, "put").filter(({ path }) => path?.startsWith("many/")).length;
    await waitFor("all that was put before is logged", () => puts() === 500);
    expect(await it.run("sync", "--up", "--delete", "many", "copy")).toMatchObject(done);
    expect(treeOf(join(it.root, "many"))).toEqual(treeOf(join(it.folder, "copy")));
    await waitFor("the two are logged", () => puts() >= 502);
    expect(puts()).toBe(502);
  });

  test("a script of commands, one connection for all", async () => {
    const script = "mkdir talk\ncd talk\nput said\nls\nmv said heard\nget heard\nrm heard\n";
    writeFileSync(join(it.folder, "said"), "words");
    expect(await it.feed(script)).toMatchObject({ ...done, output: "said\n" });
    expect(readFileSync(got(it, "heard"), "utf8")).toBe("words");
    expect(readdirSync(join(it.root, "talk"))).toEqual([]);
  });

  test("by name and by every address that the certificate has", async () => {
    for (const host of ["localhost", "127.0.0.1"])
      expect(await it.run("ls", "--server", `tls://${host}:${it.server.port}`)).toMatchObject(done);
  });

  test("--limit-rate of the client holds", async () => {
    writeFileSync(join(it.root, "paced"), randomBytes(300_000));
    const startedAt = performance.now();
    expect((await it.run("cat", "paced", "--limit-rate", "200K")).stdout.length).toBe(300_000);
    expect(performance.now() - startedAt).toBeGreaterThan(1000);
  });
});

describeTls("over TLS, on IPv6", () => {
  test("the address is in the certificate and is taken", async () => {
    using root = makeRoot({ a: "six" });
    await using server = await startServer(root.path, { args: [...pair("good").args, "--host", "::1"] });
    expect(await runClient(server.address, ["cat", "a", "--ca", authority()])).toMatchObject({ output: "six" });
  });
});

// ---------------------------------------------------------------------------------------------------- interrupted

const SIZE = 16 << 20;

interface Interrupted {
  server: string;
  bytes: number;
}

function readLogs(folder: string): Interrupted[] {
  const path = join(folder, "client_root");
  const names = existsSync(path) ? readdirSync(path).filter((name) => name.endsWith(".resume.json")) : [];
  return names.flatMap((name) => {
    return readResumeLog(join(path, name)) ?? [];
  });
}

/** Starts a transfer, kills it once its log counts so many bytes, and returns the log that is left. */
async function killAt(it: Place, bytes: number, ...args: string[]): Promise<Interrupted> {
  const child = it.spawn(...args);
  await waitFor(`${bytes} bytes are logged`, () => (readLogs(it.folder)[0]?.bytes ?? 0) >= bytes);
  child.kill("SIGKILL");
  await child.exited;
  return readLogs(it.folder)[0]!;
}

/** What an interrupted upload has brought, as the server keeps it. */
function heldBytes(it: Place): number {
  const folder = join(it.root, ".reprise");
  return Math.max(0, ...namesBelow(folder).map((name) => sizeOf(join(folder, name))));
}

describeTls("interrupted", () => {
  test("kill -9 of the client in downloads: goes on at the byte that the log names, which names tls://", async () => {
    await using it = await setUp(["--limit-rate", "3M"]);
    const digest = writeLargeFile(join(it.root, "big"), SIZE);
    const offsets = [0];
    for (const bytes of [1 << 20, 3 << 20, 5 << 20]) {
      const log = await killAt(it, bytes, "get", "big");
      expect(log).toMatchObject({ command: "get", server: it.server.address, size: SIZE });
      offsets.push(log.bytes);
    }
    expect(await it.run("resume")).toMatchObject(done);
    expect(await sha256(got(it, "big"))).toBe(digest);
    expect(readdirSync(join(it.folder, "client_root"))).toEqual(["big"]);
    await waitFor("four requests are logged", () => ofEvent(it.server, "get").length === 4);
    expect(ofEvent(it.server, "get").map((line) => line.offset)).toEqual(offsets);
    expect(ofEvent(it.server, "get").at(-1)!.bytes).toBe(SIZE - offsets.at(-1)!);
  });

  test("`resume` goes by the log alone, and not in plain to a server that had TLS", async () => {
    await using it = await setUp(["--limit-rate", "3M"]);
    const digest = writeLargeFile(join(it.root, "big"), SIZE);
    const { bytes } = await killAt(it, 1 << 20, "get", "big");
    // Without --ca nobody vouches for the server: nothing is asked of it, and part and log stay.
    const distrustful = await runClient("", ["resume"], { cwd: it.folder });
    expect(distrustful).toMatchObject({ status: 4 });
    expect(distrustful.errors).toContain("issuer that is not known");
    expect(readLogs(it.folder)[0]!.bytes).toBe(bytes);
    expect(await runClient("", ["resume", "--ca", authority()], { cwd: it.folder })).toMatchObject(done);
    expect(await sha256(got(it, "big"))).toBe(digest);
    await waitFor("both are logged", () => ofEvent(it.server, "get").length === 2);
    expect(ofEvent(it.server, "get").map((line) => line.offset)).toEqual([0, bytes]);
  });

  test("kill -9 of the client in uploads: only what the server does not hold is sent", async () => {
    await using it = await setUp();
    const digest = writeLargeFile(join(it.folder, "big"), SIZE);
    const held = [0];
    for (const bytes of [1 << 20, 5 << 20]) {
      const log = await killAt(it, bytes, "put", "big", "--limit-rate", "3M");
      expect(log).toMatchObject({ command: "put", server: it.server.address, size: SIZE });
      await waitFor("the server has seen its end", () => ofEvent(it.server, "put").length === held.length);
      held.push(heldBytes(it));
    }
    expect(await it.run("put", "big")).toMatchObject(done);
    expect(await sha256(join(it.root, "big"))).toBe(digest);
    await waitFor("the last is logged", () => ofEvent(it.server, "put").length === held.length);
    expect(ofEvent(it.server, "put").map((line) => line.offset)).toEqual(held);
    expect(ofEvent(it.server, "put").at(-1)!.bytes).toBe(SIZE - held.at(-1)!);
    expect(readLogs(it.folder)).toEqual([]);
  });

  test("kill -9 of the workers in a download: goes on by itself", async () => {
    await using it = await setUp(["--limit-rate", "3M"]);
    const digest = writeLargeFile(join(it.root, "big"), SIZE);
    const child = it.spawn("get", "big");
    for (const bytes of [1 << 20, 6 << 20]) {
      await waitFor(`${bytes} bytes are logged`, () => (readLogs(it.folder)[0]?.bytes ?? 0) >= bytes);
      await killWorkers(it.server);
    }
    expect(await child.exited).toBe(0);
    expect((await new Response(child.stderr).text()).match(/trying again/g)!.length).toBeGreaterThanOrEqual(2);
    expect(await sha256(got(it, "big"))).toBe(digest);
  });

  test("kill -9 of the workers in an upload: likewise", async () => {
    await using it = await setUp();
    const digest = writeLargeFile(join(it.folder, "big"), SIZE);
    const child = it.spawn("put", "big", "--limit-rate", "3M");
    for (const bytes of [1 << 20, 6 << 20]) {
      await waitFor(`${bytes} bytes are held`, () => heldBytes(it) >= bytes);
      await killWorkers(it.server);
    }
    expect(await child.exited).toBe(0);
    expect(await sha256(join(it.root, "big"))).toBe(digest);
    await waitFor("it is logged", () => ofEvent(it.server, "put").length === 1);
    expect(ofEvent(it.server, "put")[0]!.offset).toBeGreaterThanOrEqual(6 << 20);
  });

  /** A proxy in front of the server, and a client that goes through it. */
  function through(it: Place, spoil: Omit<ProxyOptions, "target">) {
    const proxy = startProxy({ target: it.server.port, ...spoil });
    const run = (...args: string[]) => it.run(...args, "--server", `tls://${proxy.address}`);
    return Object.assign(proxy, { run });
  }

  test("cut again and again, in either direction: goes on each time where it was", async () => {
    await using it = await setUp();
    const digest = writeLargeFile(join(it.root, "big"), SIZE);
    const cut = (bytes: Uint8Array, at: number, connection: number) => (at > connection * 700_000 ? undefined : bytes);
    using down = through(it, { toClient: cut });
    expect(await down.run("get", "big")).toMatchObject(done);
    expect(await sha256(got(it, "big"))).toBe(digest);
    using up = through(it, { toServer: cut });
    expect(await up.run("put", "client_root/big", "-t", "back")).toMatchObject(done);
    expect(await sha256(join(it.root, "back"))).toBe(digest);
    for (const event of ["get", "put"]) {
      const lines = () => ofEvent(it.server, event);
      await waitFor(
        `each ${event} is logged`,
        () => lines().length > 3 && lines().some(({ status }) => status === "ok"),
      );
      // In the order of their beginnings; that of the lines is up to the workers.
      const begun = ({ time, ms }: LogLine) => Date.parse(time!) - ms!;
      const offsets = lines()
        .toSorted((a, b) => begun(a) - begun(b))
        .map((line) => line.offset!);
      expect(offsets).toEqual(offsets.toSorted((a, b) => a - b));
    }
  });

  test("one flipped bit, in either direction: TLS finds it, and it goes on", async () => {
    await using it = await setUp();
    const digest = writeLargeFile(join(it.root, "big"), SIZE);
    const flip = (bytes: Uint8Array, at: number, connection: number) => {
      const place = 5_000_000 - at;
      if (connection === 1 && place >= 0 && place < bytes.length) bytes[place]! ^= 1;
      return bytes;
    };
    using down = through(it, { toClient: flip });
    const getting = await down.run("get", "big");
    expect(getting).toMatchObject(done);
    expect(getting.errors).toMatch(/trying again/);
    expect(await sha256(got(it, "big"))).toBe(digest);
    expect(down.connections).toBe(2);
    using up = through(it, { toServer: flip });
    const putting = await up.run("put", "client_root/big", "-t", "back");
    expect(putting).toMatchObject(done);
    expect(await sha256(join(it.root, "back"))).toBe(digest);
    expect(up.connections).toBe(2);
    await waitFor("both are logged", () => ofEvent(it.server, "get").length === 2);
    const [first, second] = ofEvent(it.server, "get").toSorted((a, b) => a.offset! - b.offset!);
    expect(first!.offset).toBe(0);
    expect(second!.offset).toBeGreaterThan(4_000_000);
  });

  test("a stall in mid-file ends by --timeout, and the next attempt goes on", async () => {
    await using it = await setUp();
    const digest = writeLargeFile(join(it.root, "big"), SIZE);
    const nothing = new Uint8Array(0);
    using proxy = through(it, { toClient: (bytes, at, number) => (number === 1 && at > 5_000_000 ? nothing : bytes) });
    const run = await proxy.run("get", "big", "--timeout", "2");
    expect(run).toMatchObject(done);
    expect(run.errors).toContain("no byte for 2 s; trying again");
    expect(await sha256(got(it, "big"))).toBe(digest);
  });

  test("cut in the handshake and the first frames: status 8 or whole, never less", async () => {
    await using it = await setUp();
    writeTree(it.root, { small: "0123456789" });
    let whole = false;
    for (let cut = 0; !whole; cut += 251) {
      using proxy = through(it, {
        toClient: (bytes, at) => (at >= cut ? undefined : bytes.subarray(0, cut - at)),
      });
      rmSync(got(it, "small"), { force: true });
      const run = await proxy.run("get", "small", "--retries", "0", "--timeout", "0.3");
      whole = existsSync(got(it, "small"));
      expect([cut, run.status, run.errors]).toEqual([cut, whole ? 0 : 8, run.errors]);
      if (whole) expect(readFileSync(got(it, "small"), "utf8")).toBe("0123456789");
    }
  });

  test("`put -` goes on in the same process when its worker is killed", async () => {
    await using it = await setUp();
    const content = randomBytes(12 << 20);
    const child = spawnFedClient(it.server.address, ["put", "-", "-t", "f", "-d", it.folder, "--ca", authority()]);
    const half = content.length / 2;
    child.stdin.write(content.subarray(0, half));
    await child.stdin.flush();
    await waitFor("some is held", () => heldBytes(it) > half / 2);
    await killWorkers(it.server);
    child.stdin.write(content.subarray(half));
    await child.stdin.end();
    expect(await child.exited).toBe(0);
    expect(readFileSync(join(it.root, "f")).equals(content)).toBe(true);
  });
});

// ---------------------------------------------------------------------------------------------------- certificates

/** What a peer of a server's kind was told, after TLS where it has that. */
interface Listener extends Disposable {
  port: number;
  connections: number;
  received(): string;
}

type Fake = { listen(port: number, host: string, then: () => void): unknown; close(): unknown; address(): unknown };

/** Closes what is left when it goes out of scope. `onSocket` is called for each connection. */
async function listenWith(
  make: (onSocket: (socket: NetSocket) => void) => Fake,
  onSocket: (socket: NetSocket) => void = () => {},
): Promise<Listener> {
  const sockets = new Set<NetSocket>();
  const chunks: Buffer[] = [];
  const listener = { port: 0, connections: 0, received: () => Buffer.concat(chunks).toString("latin1") };
  const server = make((socket) => {
    sockets.add(socket);
    listener.connections++;
    socket.on("error", () => {});
    socket.on("data", (bytes: Buffer) => chunks.push(bytes));
    onSocket(socket);
  });
  await new Promise<void>((resolve) => server.listen(0, "127.0.0.1", resolve));
  listener.port = (server.address() as { port: number }).port;
  return Object.assign(listener, {
    [Symbol.dispose]() {
      for (const socket of sockets) socket.destroy();
      server.close();
    },
  });
}

const plainly = (onSocket: (socket: NetSocket) => void) => createServer(onSocket) as Fake;

/** Shows a certificate to whoever comes, and writes down what is said after the handshake. */
const showing = (shown: Pair) => (onSocket: (socket: NetSocket) => void) =>
  createTlsServer({ cert: readFileSync(shown.cert), key: readFileSync(shown.key) }, onSocket) as unknown as Fake;

const SECRET = "rprs_not-for-everybody";
const withToken = { env: { REPRISE_TOKEN: SECRET } };

describeTls("a certificate", () => {
  type Name = Parameters<typeof pair>[0];
  const wrong: [string, Name, string, string[] | undefined, RegExp][] = [
    ["of an unknown issuer", "stranger", "127.0.0.1", undefined, /issuer that is not known here; name .* --ca FILE/],
    ["of a root that only another --ca has", "good", "localhost", ["otherRoot"], /issuer that is not known here/],
    ["without any --ca", "good", "localhost", [], /issuer that is not known here/],
    ["signed by itself", "selfSigned", "localhost", undefined, /signed by nobody but itself; name it with --ca FILE/],
    [
      "that has expired",
      "expired",
      "localhost",
      undefined,
      /has expired \(.* 20\d\d GMT\); the server needs a new one/,
    ],
    ["that is not valid yet", "early", "localhost", undefined, /is not valid before .* 20\d\d GMT, by the clock here/],
    ["for another name", "elsewhere", "localhost", undefined, /is for "DNS:example.org", not for the name used here/],
    ["for a name, used by address", "byName", "127.0.0.1", undefined, /is for "DNS:localhost", not for the name/],
    ["for an address, used by name", "byAddress", "localhost", undefined, /is for "IP Address:127.0.0.1", not for/],
  ];
  test.each(wrong)("%s: status 4 and why, at once, and nothing was said", async (_, name, host, trusted, why) => {
    using fake = await listenWith(showing(pair(name)));
    const ca = (trusted ?? ["root"]).flatMap((one) => ["--ca", authority(one as "root" | "otherRoot")]);
    const args = ["cat", "secret-name", "--retries", "1", ...ca];
    const run = await runClient(`tls://${host}:${fake.port}`, args, withToken);
    expect(run).toMatchObject({ status: 4, output: "" });
    expect(run.errors).toMatch(why);
    expect(run.errors).toStartWith(`error: ${host}:${fake.port}: `);
    expect(run.errors.trim().split("\n").length).toBe(1);
    expect(fake.received()).toBe("");
    expect(fake.connections).toBeLessThanOrEqual(1);
  });

  test("that is right: then, and only then, the token is sent", async () => {
    using fake = await listenWith(showing(pair("good")), (socket) => socket.once("data", () => socket.end()));
    const args = ["cat", "secret-name", "--ca", authority(), "--retries", "0"];
    expect((await runClient(`tls://localhost:${fake.port}`, args, withToken)).status).toBe(8);
    expect(fake.received()).toContain(SECRET);
    expect(fake.received()).toContain("secret-name");
  });

  test("signed by itself is taken where --ca names it, and where several are named", async () => {
    using root = makeRoot({ a: "taken" });
    using folder = temporaryFolder();
    const several = join(folder.path, "several.pem");
    const texts = [authority("otherRoot"), pair("selfSigned").cert].map((path) => readFileSync(path, "utf8"));
    writeFileSync(several, texts.join("\n"));
    await using server = await startServer(root.path, { args: pair("selfSigned").args });
    for (const ca of [pair("selfSigned").cert, several])
      expect(await runClient(server.address, ["cat", "a", "--ca", ca])).toMatchObject({ output: "taken" });
  });

  test("with an intermediate: who knows only the root accepts it", async () => {
    using root = makeRoot({ a: "chained" });
    await using server = await startServer(root.path, { args: pair("chained").args });
    expect(await runClient(server.address, ["cat", "a", "--ca", authority()])).toMatchObject({ output: "chained" });
  });

  test("without the intermediate that it needs is of an unknown issuer", async () => {
    using root = makeRoot({ a: "1" });
    using folder = temporaryFolder();
    const alone = join(folder.path, "alone.pem");
    const [leaf] = readFileSync(pair("chained").cert, "utf8").split(/(?<=-----END CERTIFICATE-----\n)/);
    writeFileSync(alone, leaf!);
    await using server = await startServer(root.path, { args: pairOf(alone, pair("chained").key).args });
    const run = await runClient(server.address, ["cat", "a", "--ca", authority()]);
    expect(run).toMatchObject({ status: 4 });
    expect(run.errors).toContain("issuer that is not known");
  });

  const useless: [string, (folder: string) => string, number, RegExp][] = [
    ["is not there", () => "/nonexistent", 7, /certificates in "\/nonexistent" cannot be read: ENOENT/],
    ["is a folder", (folder) => folder, 7, /certificates in .* cannot be read: EISDIR/],
    ["is something else", () => join(HOME, "package.json"), 2, /package.json" holds no certificate in PEM/],
    ["is a key", () => pair("good").key, 2, /good.key" holds no certificate in PEM/],
    ["is damaged", damaged, 2, /--ca has a certificate that cannot be read/],
  ];
  test.each(useless)("--ca that %s is an error of the command line", async (_, file, status, why) => {
    using folder = temporaryFolder();
    const run = await runClient("tls://127.0.0.1:1", ["ls", "--ca", file(folder.path), "--retries", "0"]);
    expect(run.errors).toMatch(why);
    expect(run.errors.trim().split("\n").length).toBe(1);
    expect(run.status).toBe(status);
  });

  function damaged(folder: string): string {
    const path = join(folder, "damaged.pem");
    writeFileSync(path, readFileSync(authority(), "utf8").replace(/\n.{64}\n/, "\n"));
    return path;
  }
});

describeTls("a peer that is no such server", () => {
  const retried = ["ls", "--ca", authorityIfAny(), "--retries", "1"];

  test("a plain one asked with tls://: status 4 and what to do, at once, and no token went there", async () => {
    using root = makeRoot({});
    await using server = await startServer(root.path);
    let sent = "";
    using proxy = startProxy({
      target: server.port,
      toServer(bytes) {
        sent += Buffer.from(bytes).toString("latin1");
        return bytes;
      },
    });
    const run = await runClient(`tls://${proxy.address}`, retried, withToken);
    expect(run).toMatchObject({ status: 4 });
    expect(run.errors).toBe(`error: ${proxy.address}: no TLS is spoken there; use tcp://${proxy.address}\n`);
    expect([sent.length > 100, sent.includes(SECRET), proxy.connections]).toEqual([true, false, 1]);
  });

  test("one with TLS asked in plain: status 4 and what to do, at once", async () => {
    using root = makeRoot({});
    await using server = await startServer(root.path, { args: pair("good").args });
    const address = server.address.replace("tls://", "");
    for (const plain of [address, `tcp://${address}`]) {
      const run = await runClient(plain, ["ls", "--retries", "1"]);
      expect(run).toMatchObject({ status: 4 });
      expect(run.errors).toBe(`error: ${address}: TLS is spoken there; use tls://${address}\n`);
    }
    await waitFor("each has one line", () => server.log.length === 2);
    expect(server.log.map((line) => `${line.event} ${line.status}`)).toEqual(["close bad_frame", "close bad_frame"]);
  });

  test("one that speaks HTTP: status 4, at once", async () => {
    const answer = "HTTP/1.1 400 Bad Request\r\nConnection: close\r\n\r\n";
    using http = await listenWith(plainly, (socket) => socket.once("data", () => socket.end(answer)));
    const run = await runClient(`tls://127.0.0.1:${http.port}`, retried, withToken);
    expect(run).toMatchObject({ status: 4 });
    expect(run.errors).toContain("no TLS is spoken there");
    expect(http.connections).toBe(1);
    expect(http.received()).not.toContain(SECRET);
  });

  const gone: [string, (socket: NetSocket) => void, RegExp, ...timeout: string[]][] = [
    ["says nothing", () => {}, /does not answer for 0.5 s/, "--timeout", "0.5"],
    ["ends at once", (socket) => void socket.end(), /closed in the middle of the TLS handshake/],
    ["cuts at once", (socket) => void socket.resetAndDestroy(), /(cut|closed in the middle of the TLS handshake)/],
    [
      "ends after the first words",
      (socket) => void socket.once("data", () => socket.end()),
      /closed in the middle of the TLS handshake/,
    ],
    [
      "stops in the middle of its own",
      (socket) => void socket.once("data", () => socket.write(Buffer.from("160303007a0200", "hex"))),
      /does not answer for 0.5 s/,
      ...["--timeout", "0.5"],
    ],
  ];
  test.each(gone)("one that %s: tried again, then status 8", async (_, behaviour, why, ...timeout) => {
    using fake = await listenWith(plainly, behaviour);
    const run = await runClient(`tls://127.0.0.1:${fake.port}`, [...retried, ...timeout], withToken);
    expect(run).toMatchObject({ status: 8 });
    expect(run.errors).toMatch(why);
    expect(run.errors).toContain("given up after 1 retries");
    expect(fake.connections).toBe(2);
    expect(fake.received()).not.toContain(SECRET);
  });

  const after: [string, (socket: NetSocket) => void, ...timeout: string[]][] = [
    ["says nothing", () => {}, "--timeout", "3"],
    ["ends", (socket) => void socket.end()],
    ["cuts", (socket) => void socket.destroy()],
  ];
  test.each(after)("one that %s after the handshake: tried again, then status 8", async (_, behaviour, ...timeout) => {
    using fake = await listenWith(showing(pair("good")), behaviour);
    const run = await runClient(`tls://127.0.0.1:${fake.port}`, [...retried, ...timeout]);
    expect(run).toMatchObject({ status: 8 });
    expect(run.errors).toMatch(/no byte for 3 s|closed the connection|connection was cut|connection is closed/);
    expect(fake.connections).toBe(2);
  });

  test("one that speaks TLS, but something else within: status 9", async () => {
    using fake = await listenWith(showing(pair("good")), (socket) => void socket.write("HTTP/1.1 400 Bad Request\r\n"));
    const run = await runClient(`tls://127.0.0.1:${fake.port}`, retried);
    expect(run).toMatchObject({ status: 9 });
    expect(run.errors).toContain("not the reprise protocol");
  });

  test("one that ends the handshake when the client is interrupted: 130, and no wait", async () => {
    using fake = await listenWith(plainly);
    const child = spawnClient(`tls://127.0.0.1:${fake.port}`, ["ls"]);
    await waitFor("it has connected", () => fake.connections === 1);
    child.kill("SIGINT");
    expect(await child.exited).toBe(130);
  });
});

/** At the time when tests are declared there may be no openssl. */
function authorityIfAny(): string {
  return hasOpenssl ? authority() : "";
}

describeTls("versions of TLS", () => {
  /** What openssl says of a handshake with that version. */
  async function shake(port: number, version: string): Promise<string> {
    const args = ["-connect", `127.0.0.1:${port}`, version, "-cipher", "ALL:@SECLEVEL=0", "-CAfile", authority()];
    const child = Bun.spawn(["openssl", "s_client", ...args], { stdio: ["ignore", "pipe", "pipe"] });
    const texts = await Promise.all([new Response(child.stdout).text(), new Response(child.stderr).text()]);
    return texts.join("");
  }

  test("1.2 and 1.3 are spoken, 1.1 and 1.0 are refused", async () => {
    using root = makeRoot({});
    await using server = await startServer(root.path, { args: pair("good").args });
    expect(await shake(server.port, "-tls1_3")).toMatch(/New, TLSv1.3[\s\S]*Verif.*(OK|0 \(ok\))/i);
    expect(await shake(server.port, "-tls1_2")).toMatch(/New, TLSv1.2[\s\S]*Verif.*(OK|0 \(ok\))/i);
    for (const old of ["-tls1_1", "-tls1"]) {
      const text = await shake(server.port, old);
      expect(text).toContain("alert protocol version");
      expect(text).toMatch(/New, \(NONE\)/);
    }
  });

  test("a server that has no version in common: status 4 and why, at once", async () => {
    const files = ["-cert", pair("good").cert, "-key", pair("good").key];
    const port = freePort();
    const old = ["-tls1_1", "-cipher", "ALL:@SECLEVEL=0"];
    // It ends with its standard input.
    const child = Bun.spawn(["openssl", "s_server", "-accept", `127.0.0.1:${port}`, ...files, ...old], {
      stdio: ["pipe", "pipe", "pipe"],
    });
    try {
      const reader = child.stdout.getReader();
      await waitFor("it accepts", async () => /ACCEPT/.test(new TextDecoder().decode((await reader.read()).value)));
      const run = await runClient(`tls://127.0.0.1:${port}`, ["ls", "--ca", authority(), "--retries", "1"]);
      expect(run).toMatchObject({ status: 4 });
      expect(run.errors).toMatch(/no TLS that both speak: .*PROTOCOL_VERSION/i);
    } finally {
      child.kill();
      await child.exited;
    }
  });
});

describeTls("--tls-cert and --tls-key", () => {
  const notPem = join(HOME, "package.json");
  const wrong: [string, () => string[], number, RegExp][] = [
    ["one without the other", () => ["--tls-cert", pair("good").cert], 2, /--tls-cert and --tls-key go together/],
    ["the other without the one", () => ["--tls-key", pair("good").key], 2, /--tls-cert and --tls-key go together/],
    ["a certificate not there", () => pairOf("/no/cert", pair("good").key).args, 7, /cannot read "\/no\/cert": ENOENT/],
    ["a key not there", () => pairOf(pair("good").cert, "/no/key").args, 7, /cannot read "\/no\/key": ENOENT/],
    ["a folder", () => pairOf(HOME, pair("good").key).args, 7, /cannot read ".*": EISDIR/],
    ["no PEM for certificate", () => pairOf(notPem, pair("good").key).args, 2, /are no certificate and key in PEM/],
    ["no PEM for key", () => pairOf(pair("good").cert, notPem).args, 2, /are no certificate and key in PEM/],
    ["the two changed about", () => pairOf(pair("good").key, pair("good").cert).args, 2, /are no certificate and key/],
    [
      "another's key",
      () => pairOf(pair("good").cert, pair("renewed").key).args,
      2,
      /is not the key of the certificate/,
    ],
    ["a chain with rubbish in it", () => pairOf(badChain(), pair("good").key).args, 2, /no certificate and key in PEM/],
  ];
  test.each(wrong)("%s: no start, and why", async (_, args, status, why) => {
    const child = Bun.spawn([process.execPath, join(HOME, "server.ts"), "--port", "0", ...args()], {
      cwd: HOME,
      stdio: ["ignore", "pipe", "pipe"],
      // One that starts after all would not end.
      timeout: 20_000,
    });
    const errors = await new Response(child.stderr).text();
    expect(errors).toMatch(why);
    expect(errors.trim().split("\n").length).toBe(1);
    expect(await child.exited).toBe(status);
    expect(await new Response(child.stdout).text()).toBe("");
  });

  /** A right certificate, and behind it one that is damaged. */
  function badChain(): string {
    const path = pair("good").cert.replace("good.pem", "badChain.pem");
    const text = readFileSync(authority(), "utf8").replace(/\n.{64}\n/, "\n");
    writeFileSync(path, readFileSync(pair("good").cert, "utf8") + text);
    return path;
  }
});

// ---------------------------------------------------------------------------------------------------- SIGHUP

interface Renewable extends AsyncDisposable {
  root: string;
  server: Server;
  tokens: string;
  /** Puts another certificate and key where the server reads them. */
  install(name: "good" | "renewed"): void;
  cert: string;
  /** Sends SIGHUP and returns when the supervisor has taken note. */
  reload(): Promise<void>;
}

async function setUpRenewable(args: (folder: string) => string[] = () => []): Promise<Renewable> {
  const root = makeRoot({ a: "1" });
  const folder = temporaryFolder();
  const [cert, key] = [join(folder.path, "cert.pem"), join(folder.path, "key.pem")];
  const install = (name: "good" | "renewed") => {
    copyFileSync(pair(name).cert, cert);
    copyFileSync(pair(name).key, key);
  };
  install("good");
  const server = await startServer(root.path, { args: [...pairOf(cert, key).args, ...args(folder.path)] });
  const taken = () => ofEvent(server, "reload").filter(({ worker }) => worker === 0).length;
  return {
    root: root.path,
    server,
    cert,
    tokens: join(folder.path, "tokens.json"),
    install,
    async reload() {
      const before = taken();
      server.process.kill("SIGHUP");
      await waitFor("it is read again", () => taken() > before);
    },
    async [Symbol.asyncDispose]() {
      await server[Symbol.asyncDispose]();
      root[Symbol.dispose]();
      folder[Symbol.dispose]();
    },
  };
}

/** A handshake of a client that trusts the test's root. */
async function shakeHands(port: number): Promise<TLSSocket> {
  const socket = connectTls({ host: "127.0.0.1", port, ca: readFileSync(authority()) });
  await new Promise<void>((resolve, reject) => {
    socket.once("secureConnect", resolve);
    socket.once("error", reject);
  });
  socket.on("error", () => {});
  return socket;
}

async function fingerprintAt(port: number): Promise<string> {
  const socket = await shakeHands(port);
  const { fingerprint256 } = socket.getPeerCertificate();
  socket.destroy();
  return fingerprint256;
}

const fingerprintOf = (name: "good" | "renewed") => new X509Certificate(readFileSync(pair(name).cert)).fingerprint256;

describeTls("SIGHUP", () => {
  /** Which certificate so many handshakes show; over that many, both workers have their turn. */
  async function shown(port: number): Promise<string[]> {
    const all = await Promise.all(Array.from({ length: 12 }, () => fingerprintAt(port)));
    return [...new Set(all)];
  }

  test("a new certificate is shown to who comes, and a transfer goes on under the old one", async () => {
    await using it = await setUpRenewable(() => ["--limit-rate", "16M"]);
    using folder = temporaryFolder();
    const digest = writeLargeFile(join(it.root, "big"), 48 << 20);
    expect(await shown(it.server.port)).toEqual([fingerprintOf("good")]);
    const child = spawnClient(it.server.address, [
      "get",
      "big",
      "--retries",
      "0",
      "--ca",
      authority(),
      "-d",
      folder.path,
    ]);
    await waitFor("it has begun", () => existsSync(join(folder.path, "big.resume.json")));
    // So that it is not done before, however long that takes: the kernel holds less than is left.
    child.kill("SIGSTOP");
    it.install("renewed");
    await it.reload();
    await waitFor("all show the new one", async () => {
      const fingerprints = await shown(it.server.port);
      return fingerprints.length === 1 && fingerprints[0] === fingerprintOf("renewed");
    });
    expect(ofEvent(it.server, "get")).toEqual([]);
    child.kill("SIGCONT");
    expect(await child.exited).toBe(0);
    expect(await sha256(join(folder.path, "big"))).toBe(digest);
    await waitFor("it is logged", () => ofEvent(it.server, "get").length > 0);
    expect(ofEvent(it.server, "get")).toMatchObject([{ offset: 0, bytes: 48 << 20, status: "ok" }]);
  });

  test("200 connections during ten of them: none refused, none cut, no worker replaced", async () => {
    await using it = await setUpRenewable();
    const workers = it.server.workers();
    let left = 200;
    let reloads = 0;
    const connectAll = async () => {
      while (left-- > 0) {
        const remote = remoteOf(it.server, { retries: 0 });
        expect((await remote.stat("a")).size).toBe(1);
        await Bun.sleep(1);
        expect((await remote.stat("a")).size).toBe(1);
        await remote.quit();
      }
    };
    const reloadAll = async () => {
      for (; reloads < 10 || left > 0; reloads++) {
        it.install(reloads % 2 === 0 ? "renewed" : "good");
        await it.reload();
      }
    };
    await Promise.all([connectAll(), connectAll(), connectAll(), connectAll(), reloadAll()]);
    expect(reloads).toBeGreaterThanOrEqual(10);
    expect(it.server.workers().sort()).toEqual(workers.sort());
    await it.server.stop("SIGINT");
    expect(ofEvent(it.server, "close")).toEqual([]);
  });

  const broken: [string, (it: Renewable) => void, RegExp][] = [
    ["that is half written", (it) => truncateSync(it.cert, 300), /no certificate and key in PEM/],
    ["of which the chain is half written", addHalf, /no certificate and key in PEM/],
    ["that is not there", (it) => rmSync(it.cert), /cannot read .*cert.pem": ENOENT/],
    ["of another key", (it) => copyFileSync(pair("renewed").cert, it.cert), /is not the key of the certificate/],
  ];
  test.each(broken)("a certificate %s is said, and the old one stays", async (_, damage, why) => {
    await using it = await setUpRenewable();
    damage(it);
    it.server.process.kill("SIGHUP");
    const isSaid = (text: string) => why.test(text) && text.includes("what was read before stays in use");
    await waitFor("it is said", () => isSaid(it.server.stderr()));
    expect(await shown(it.server.port)).toEqual([fingerprintOf("good")]);
    it.install("renewed");
    await it.reload();
    await waitFor(
      "the new one is shown",
      async () => (await fingerprintAt(it.server.port)) === fingerprintOf("renewed"),
    );
  });

  function addHalf(it: Renewable): void {
    appendFileSync(it.cert, readFileSync(authority(), "utf8").slice(0, 300));
  }

  test("tokens: one that was added is let in, one that was removed is refused at its next request, whatever became of the certificate", async () => {
    const token = async (...args: string[]) => {
      const child = Bun.spawn([process.execPath, join(HOME, "server.ts"), "token", ...args], {
        stdio: ["ignore", "pipe", "ignore"],
      });
      const text = await new Response(child.stdout).text();
      expect(await child.exited).toBe(0);
      return text.trim();
    };
    let file = "";
    let ann = "";
    using folder = temporaryFolder();
    file = join(folder.path, "tokens.json");
    ann = await token("add", "ann", "--access", "read", "--tokens", file);
    await using it = await setUpRenewable(() => ["--tokens", file]);
    const open = remoteOf(it.server, { token: ann, retries: 0 });
    expect((await open.stat("a")).size).toBe(1);
    const bob = await token("add", "bob", "--access", "read", "--tokens", file);
    const run = (text: string) =>
      runClient(it.server.address, ["cat", "a", "--ca", authority()], { env: { REPRISE_TOKEN: text } });
    expect((await run(bob)).status).toBe(4);
    await it.reload();
    expect(await waitFor("bob is let in", async () => (await run(bob)).output)).toBe("1");
    expect((await open.stat("a")).size).toBe(1);
    await token("remove", "ann", "--tokens", file);
    expect((await open.stat("a")).size).toBe(1);
    truncateSync(it.cert, 300);
    await it.reload();
    const refused = await waitFor("ann is refused", () => open.stat("a").then(() => undefined, String));
    expect(refused).toContain("access denied");
    // By either worker.
    await waitFor("she is by all", async () => {
      const runs = await Promise.all([run(ann), run(ann), run(ann), run(ann)]);
      return runs.every(({ status }) => status === 4);
    });
    await waitFor("he is let in still", async () => (await run(bob)).output === "1");
    expect(it.server.stderr()).not.toContain(ann);
    expect(it.server.stderr()).not.toContain(bob);
  });
});

// ---------------------------------------------------------------------------------------------------- bad peers

/** Sockets of a process, as its descriptors tell. */
function socketsOf(pid: number): number {
  const folder = `/proc/${pid}/fd`;
  return readdirSync(folder).filter((name) => {
    try {
      return readlinkSync(join(folder, name)).startsWith("socket:");
    } catch {
      return false;
    }
  }).length;
}

/** A ClientHello, as a client of ours sends it. */
async function helloOfClient(): Promise<Buffer> {
  using fake = await listenWith(plainly);
  const socket = connectTls({ host: "127.0.0.1", port: fake.port });
  socket.on("error", () => {});
  await waitFor("it has come", () => fake.received().length > 100);
  const bytes = Buffer.from(fake.received(), "latin1");
  socket.destroy();
  return bytes;
}

describeTls("a peer", () => {
  const getFrame = (path: string) => encodeRequest({ action: "get", path, offset: 0, length: TO_THE_END, etag: "" });

  test("that is silent, or begins and stops, or sends garbage is closed, with a line each, and harms nobody", async () => {
    using root = makeRoot({ a: "1" });
    await using server = await startServer(root.path, { args: [...pair("good").args, "--idle-timeout", "4"] });
    const workers = server.workers();
    const sockets = workers.map(socketsOf);
    const hello = await helloOfClient();
    const openings = [
      Buffer.alloc(0),
      hello.subarray(0, 1),
      hello.subarray(0, 5),
      hello.subarray(0, hello.length / 2),
      hello,
      Buffer.from("GET / HTTP/1.1\r\n\r\n"),
      Buffer.concat([encodeHello(), getFrame("a")]),
      Buffer.from(randomBytes(100_000)),
      Buffer.concat([hello, Buffer.from(randomBytes(10_000))]),
      Buffer.alloc(70_000, Buffer.from("16030140000100", "hex")),
    ];
    const raws = await Promise.all(openings.map(() => connectRaw(server.port)));
    for (const [index, raw] of raws.entries()) raw.socket.write(openings[index]!);
    const words = ["", encodeHello().subarray(0, 3), "GET / HTTP/1.1\r\n\r\n"];
    const shaken = await Promise.all(
      words.map(async (said) => {
        const socket = await shakeHands(server.port);
        socket.write(said);
        return socket;
      }),
    );
    const texts = shaken.map((socket) => {
      let text = "";
      socket.on("data", (bytes) => {
        text += bytes.toString("latin1");
      });
      return () => text;
    });
    const peers = raws.length + shaken.length;
    await waitFor("all are closed", () => raws.every((raw) => raw.closed()) && shaken.every(({ closed }) => closed));
    expect(texts[0]!()).toContain("closed for lack of activity");
    expect(texts[2]!()).toContain("not the reprise protocol");
    await waitFor("each has its line", () => server.log.length >= peers);
    expect(await runClient(server.address, ["cat", "a", "--ca", authority()])).toMatchObject({ output: "1" });
    await waitFor("what was served is logged", () => ofEvent(server, "get").length > 0);
    expect(ofEvent(server, "close").length).toBe(peers);
    expect(new Set(server.log.map(({ event, status }) => `${event} ${status}`))).toEqual(
      new Set(["close idle", "close bad_frame", "get ok"]),
    );
    // One line says what is served, every other is JSON.
    expect(
      server
        .stderr()
        .trim()
        .split("\n")
        .filter((line) => !line.startsWith("{")).length,
    ).toBe(1);
    expect(server.workers().sort()).toEqual(workers.sort());
    await waitFor("no socket is left", () => workers.every((pid, index) => socketsOf(pid) <= sockets[index]!));
    for (const raw of raws) raw[Symbol.dispose]();
  });

  test("that is silent stops nobody: 500 of them, and each is closed after the time for a handshake", async () => {
    using root = makeRoot({ a: "1" });
    await using server = await startServer(root.path, { args: pair("good").args });
    const hello = await helloOfClient();
    const raws = await Promise.all(Array.from({ length: 500 }, () => connectRaw(server.port)));
    for (const [index, raw] of raws.entries()) raw.socket.write(hello.subarray(0, index % 3 === 0 ? 0 : index));
    expect(await runClient(server.address, ["cat", "a", "--ca", authority()])).toMatchObject({ output: "1" });
    await waitFor("all are closed", () => raws.every((raw) => raw.closed()));
    expect(await runClient(server.address, ["cat", "a", "--ca", authority()])).toMatchObject({ output: "1" });
    for (const raw of raws) raw[Symbol.dispose]();
  });

  /** Connections that ask for a file and read nothing of the answer. */
  async function deafReaders(port: number, count: number, path: string) {
    const sockets = await Promise.all(
      Array.from({ length: count }, async () => {
        const { promise, resolve } = Promise.withResolvers<void>();
        const socket = await Bun.connect({
          hostname: "127.0.0.1",
          port,
          tls: { ca: readFileSync(authority(), "utf8") },
          socket: {
            data() {},
            error() {},
            handshake(socket) {
              socket.write(Buffer.concat([encodeHello(), getFrame(path)]));
              socket.pause();
              resolve();
            },
          },
        });
        await promise;
        return socket;
      }),
    );
    return { sockets, [Symbol.dispose]: () => sockets.forEach((socket) => void socket.terminate()) };
  }

  test("that reads nothing is closed by --idle-timeout, and so is one that greeted and says nothing more", async () => {
    using root = makeRoot({});
    writeLargeFile(join(root.path, "big"), 64 << 20);
    await using server = await startServer(root.path, { args: [...pair("good").args, "--idle-timeout", "2"] });
    using _deaf = await deafReaders(server.port, 1, "big");
    const greeted = await shakeHands(server.port);
    let text = "";
    greeted.on("data", (bytes) => {
      text += bytes.toString("latin1");
    });
    greeted.write(encodeHello());
    await waitFor("both are closed", () => greeted.closed && ofEvent(server, "get").length === 1);
    expect(ofEvent(server, "get")[0]).toMatchObject({ status: "timeout" });
    expect(text).toContain("closed for lack of activity");
  });

  test("that reads nothing costs a chunk: 200 of them leave others their speed and the worker its memory", async () => {
    using root = makeRoot({});
    const digest = writeLargeFile(join(root.path, "big"), 50 << 20);
    await using server = await startServer(root.path, { args: [...pair("good").args, "--workers", "1"] });
    using _deaf = await deafReaders(server.port, 200, "big");
    using folder = temporaryFolder();
    const run = await runClient(server.address, ["get", "big", "-d", folder.path, "--ca", authority()]);
    expect(run).toMatchObject(done);
    expect(await sha256(join(folder.path, "big"))).toBe(digest);
    // What none of them has read would be 10 GB.
    expect(await residentBytes(server.workers()[0]!)).toBeLessThan(300e6);
  });
});

/** With few descriptors, so that a connection that is never let go is soon one too many. */
const withFewDescriptors = ["sh", "-c", 'ulimit -n 300; exec "$@"', "sh"];

test.each(["tcp", ...(hasOpenssl ? ["tls"] : [])])(
  "200 peers that are gone before they are accepted leave nothing (%s)",
  async (scheme) => {
    using root = makeRoot({ a: "1" });
    const secure = scheme === "tls" ? pair("good").args : [];
    const args = [...secure, "--workers", "1"];
    await using server = await startServer(root.path, { args, runBy: withFewDescriptors });
    const [worker] = server.workers() as [number];
    process.kill(worker, "SIGSTOP");
    for (let left = 200; left > 0; left--) {
      const socket = connect({ host: "127.0.0.1", port: server.port });
      socket.on("error", () => {});
      await new Promise((resolve) => socket.once("connect", resolve));
      await new Promise((resolve) => socket.once("close", resolve).resetAndDestroy());
    }
    process.kill(worker, "SIGCONT");
    const trust = scheme === "tls" ? ["--ca", authority()] : [];
    const run = await runClient(server.address, ["cat", "a", "--retries", "0", ...trust]);
    expect(run).toMatchObject({ status: 0, output: "1" });
    expect(server.stderr()).not.toContain("TypeError");
    expect(server.workers()).toEqual([worker]);
  },
);

describeTls("a server with TLS", () => {
  test("--limit-rate holds for one connection", async () => {
    using root = makeRoot({ a: randomBytes(300_000) });
    await using server = await startServer(root.path, { args: [...pair("good").args, "--limit-rate", "200K"] });
    const startedAt = performance.now();
    expect((await runClient(server.address, ["cat", "a", "--ca", authority()])).stdout.length).toBe(300_000);
    expect(performance.now() - startedAt).toBeGreaterThan(1000);
  });

  test("--max-connections: one more is told so, in words", async () => {
    using root = makeRoot({ a: "1" });
    const args = [...pair("good").args, "--workers", "1", "--max-connections", "1"];
    await using server = await startServer(root.path, { args });
    const first = await shakeHands(server.port);
    const refused = await runClient(server.address, ["cat", "a", "--retries", "0", "--ca", authority()]);
    expect(refused).toMatchObject({ status: 9 });
    expect(refused.errors).toContain("too many connections");
    first.destroy();
    expect(await runClient(server.address, ["cat", "a", "--ca", authority()])).toMatchObject({ output: "1" });
  });

  test("SIGTERM lets a transfer end, sends the idle away in words, and ends with status 0", async () => {
    using root = makeRoot({ big: randomBytes(2_000_000) });
    await using server = await startServer(root.path, { args: [...pair("good").args, "--limit-rate", "1M"] });
    const child = spawnClient(server.address, ["cat", "big", "--retries", "0", "--ca", authority()]);
    const reader = child.stdout.getReader();
    let bytes = (await reader.read()).value!.length;
    const idle = await shakeHands(server.port);
    let text = "";
    idle.on("data", (bytes) => {
      text += bytes.toString("latin1");
    });
    // One that the worker does not know yet would only be closed.
    idle.write(encodeHello());
    await waitFor("it is greeted", () => text !== "");
    const stopped = server.stop("SIGTERM");
    for (let part = await reader.read(); !part.done; part = await reader.read()) bytes += part.value.length;
    expect([await child.exited, bytes, await stopped]).toEqual([0, 2_000_000, 0]);
    await waitFor("the idle one is closed", () => idle.closed);
    expect(text).toContain("the server is stopping");
  });

  test("2,000 connections, whole, cut and not begun, leave no socket and little memory", async () => {
    using root = makeRoot({ a: "1" });
    await using server = await startServer(root.path, { args: [...pair("good").args, "--workers", "1"] });
    const [worker] = server.workers() as [number];
    const connectMany = async (count: number) => {
      let left = count;
      const one = async () => {
        while (left-- > 0) {
          if (left % 4 === 0) (await shakeHands(server.port)).destroy();
          else if (left % 4 === 1) (await connectRaw(server.port)).socket.end(randomBytes(300));
          else {
            const remote = remoteOf(server, { retries: 0 });
            expect((await remote.stat("a")).size).toBe(1);
            if (left % 4 === 2) remote.close();
            else await remote.quit();
          }
        }
      };
      await Promise.all(Array.from({ length: 10 }, one));
    };
    const sockets = socketsOf(worker);
    await connectMany(500);
    const before = await residentBytes(worker);
    await connectMany(2_000);
    await waitFor("no socket is left", () => socketsOf(worker) <= sockets);
    expect(server.workers()).toEqual([worker]);
    // A kilobyte that stays of each would be two million.
    expect((await residentBytes(worker)) - before).toBeLessThan(30e6);
  });
});
