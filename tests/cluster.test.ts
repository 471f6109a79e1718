/**
 * A master and the servers that have joined it: whatever changes in one tree is soon in all, and nothing that was
 * acknowledged is lost, whoever is killed, stopped, separated or full meanwhile.
 */
import { afterAll, beforeAll, describe, expect, setDefaultTimeout, test } from "bun:test";
import {
  appendFileSync,
  cpSync,
  linkSync,
  mkdirSync,
  readdirSync,
  readFileSync,
  renameSync,
  rmSync,
  statSync,
  symlinkSync,
  truncateSync,
  unlinkSync,
  utimesSync,
  writeFileSync,
} from "node:fs";
import { join } from "node:path";
import { parseServers, Remote } from "../client.ts";
import { EmbeddedLedger } from "../ledger.ts";
import type { Meta } from "../protocol.ts";
import type { Target } from "../resume.ts";
import type { Source } from "../source.ts";
import { type Cluster, type Node, startCluster, statusOf } from "./clusters.ts";
import { startProxy } from "./faults/proxy.ts";
import {
  type Files,
  ifStill,
  killHard,
  loggedIn,
  makeRoot,
  mountSmall,
  randomBytes,
  runClient,
  seeded,
  sha256,
  sizeOf,
  spawnClient,
  startServer,
  TEST_MS,
  temporaryFolder,
  treeOf,
  waitFor,
  writeLargeFile,
  writeTree,
} from "./fixtures.ts";

setDefaultTimeout(TEST_MS);

const MIB = 1024 * 1024;

/** A file of bytes in memory, for an upload. */
function sourceOf(name: string, content: Uint8Array, mtime: number): Source {
  return {
    name,
    size: content.length,
    mtime,
    read: async (offset, into) => {
      const piece = content.subarray(offset, offset + into.length);
      into.set(piece);
      return piece.length;
    },
    sum: async () => undefined,
    verify: () => {},
    renew: () => {},
    close: () => {},
  };
}

/** What comes of a download, in memory. */
class Received implements Target {
  etag = "";
  readonly end = undefined;
  readonly restartable = true;
  #chunks: Uint8Array[] = [];
  bytes = 0;

  begin({ etag }: Meta): void {
    this.etag = etag;
  }

  async append(chunk: Uint8Array, _: number, free: (chunk: Uint8Array) => void): Promise<void> {
    this.#chunks.push(chunk.slice());
    this.bytes += chunk.length;
    free(chunk);
  }

  async settle(): Promise<void> {}

  reset(): void {
    this.#chunks = [];
    this.bytes = 0;
  }

  get content(): Buffer {
    return Buffer.concat(this.#chunks);
  }
}

/** The server itself, not whom it would send a client to. */
function remoteOf({ server }: Node): Remote {
  return new Remote({ servers: parseServers(server.address), direct: true });
}

async function put(remote: Remote, path: string, content: Uint8Array, mtime = 1.7e15): Promise<Meta> {
  const options = { path, id: "", noClobber: false, etag: "", parents: true };
  return remote.upload(options, sourceOf(path, content, mtime));
}

async function read(remote: Remote, path: string): Promise<Buffer> {
  const target = new Received();
  await remote.download(path, target);
  return target.content;
}

async function namesIn(remote: Remote, path: string, recursive = false): Promise<string[]> {
  const names: string[] = [];
  for await (const entry of remote.list(path, recursive)) names.push(entry.path);
  return names;
}

/** The tree below one folder of a node; nothing where there is none. */
function treeIn({ root }: Node, folder: string): string[] {
  return ifStill(() => treeOf(join(root, folder))) ?? [];
}

/** What a folder has, by name and content: no times. */
function filesIn({ root }: Node, folder: string): Record<string, string> {
  const found: Record<string, string> = {};
  for (const name of readdirSync(join(root, folder)).sort()) {
    const path = join(root, folder, name);
    found[name] = statSync(path).isDirectory() ? "(folder)" : readFileSync(path, "utf8");
  }
  return found;
}

/** Waits until all have what one has in a folder. */
async function reachesAll(cluster: Cluster, from: Node, folder: string): Promise<string[]> {
  await waitFor(`all have what ${from.name} has in ${folder}`, () => {
    const tree = treeIn(from, folder);
    return cluster.nodes.every((node) => Bun.deepEquals(treeIn(node, folder), tree));
  });
  return treeIn(from, folder);
}

/** What all members have sent of paths that begin so. */
function getsOf(nodes: Node[], start: string) {
  return nodes
    .flatMap(({ server }) => server.log)
    .filter(({ event, path }) => event === "get" && path?.startsWith(start));
}

const bytesOf = (lines: { bytes?: number }[]) => lines.reduce((sum, { bytes = 0 }) => sum + bytes, 0);

/** kill -9 of all its processes at once. */
async function killAll(node: Node): Promise<void> {
  const children = node.server.workers();
  const killed = node.kill();
  for (const pid of children) killHard(pid);
  await killed;
}

// ---------------------------------------------------------------------------------------------------- changes

describe("changes", () => {
  let cluster: Cluster;
  beforeAll(async () => {
    cluster = await startCluster({ replicas: 2, files: { "there/before": "since before anybody joined" } });
  });
  afterAll(() => cluster[Symbol.asyncDispose]());
  const nodeAt = (at: number) => cluster.nodes[at % cluster.nodes.length]!;

  test.each([0, 1, 2])("put, rm, mv, mkdir through node %d reach every member", async (at) => {
    using folder = makeRoot({
      file: "a file",
      "tree/one.txt": "1",
      "tree/sub/two": randomBytes(700_000, at + 1),
      "tree/sub/zwölf ü.bin": "",
      "tree/empty/": "",
    });
    utimesSync(join(folder.path, "file"), 1234, 987_654.321);
    const { address } = nodeAt(at).server;
    const top = `client${at}`;
    const run = async (...args: string[]) => {
      const { status, errors } = await runClient(address, args, { cwd: folder.path });
      expect([args[0], status, errors]).toEqual([args[0], 0, ""]);
    };
    await run("mkdir", "-p", `${top}/made`);
    await run("put", "-q", "file", "-t", `${top}/file`);
    await run("put", "-q", "-r", "tree", "-t", top);
    await cluster.settled();
    expect(treeIn(nodeAt(at + 1), `${top}/tree`)).toEqual(treeOf(join(folder.path, "tree")));
    const [file] = treeOf(folder.path);
    expect(file).toMatch(/^file file 6 98765432\d{4} /);
    expect(treeIn(nodeAt(at + 1), top)).toContain(file!);
    await run("mv", `${top}/file`, `${top}/made/renamed`);
    await run("mv", `${top}/tree`, `${top}/made/tree`);
    await cluster.settled();
    expect(treeIn(nodeAt(at + 2), `${top}/made/tree`)).toEqual(treeOf(join(folder.path, "tree")));
    await run("rm", `${top}/made/renamed`);
    await run("rm", "-r", `${top}/made/tree/sub`);
    await cluster.settled();
    for (const node of cluster.nodes) {
      const names = treeIn(node, top).map((line) => line.split(" ").slice(0, 2).join(" "));
      const left = ["made folder", "made/tree folder", "made/tree/empty folder", "made/tree/one.txt file"];
      expect(names).toEqual(left);
    }
  });

  /** By any other program, in the root of one member. */
  const CHANGES: [string, (folder: string, elsewhere: string) => void][] = [
    ["written", (folder) => writeFileSync(join(folder, "file"), "new")],
    ["appended to", (folder) => appendFileSync(join(folder, "file"), " and more")],
    ["truncated", (folder) => truncateSync(join(folder, "file"), 2)],
    ["touched", (folder) => utimesSync(join(folder, "file"), 5, 12_345.678)],
    ["renamed", (folder) => renameSync(join(folder, "file"), join(folder, "renamed"))],
    ["removed", (folder) => unlinkSync(join(folder, "file"))],
    [
      "replaced by a folder",
      (folder) => {
        rmSync(join(folder, "other"));
        writeTree(folder, { "other/in/it": "x" });
      },
    ],
    [
      "replaced by a file again",
      (folder) => {
        rmSync(join(folder, "sub"), { recursive: true });
        writeFileSync(join(folder, "sub"), "a file now");
      },
    ],
    [
      "moved in as a folder with many",
      (folder, elsewhere) => {
        for (let count = 0; count < 600; count++) writeTree(elsewhere, { [`${count % 7}/${count}`]: `${count}` });
        renameSync(elsewhere, join(folder, "many"));
      },
    ],
    ["given a second name", (folder) => linkSync(join(folder, "file"), join(folder, "second"))],
    [
      "written with its size and time as before",
      (folder) => {
        const { atime, mtime } = statSync(join(folder, "file"));
        writeFileSync(join(folder, "file"), "the first".split("").reverse().join(""));
        utimesSync(join(folder, "file"), atime, mtime);
      },
    ],
    ["moved as a folder", (folder) => renameSync(join(folder, "sub"), join(folder, "moved"))],
  ];

  test.each(CHANGES)("what any program has %s in a root reaches every member", async (what, change) => {
    const names = CHANGES.map(([name]) => name);
    const node = nodeAt(names.indexOf(what));
    const folder = `any/${what}`;
    writeTree(node.root, { [`${folder}/file`]: "the first", [`${folder}/other`]: "2", [`${folder}/sub/a/b`]: "3" });
    const before = await reachesAll(cluster, node, folder);
    expect(before.length).toBe(5);
    using elsewhere = temporaryFolder(join(node.root, "..", ".."));
    change(join(node.root, folder), elsewhere.path);
    const after = await reachesAll(cluster, node, folder);
    expect(after).not.toEqual(before);
    mkdirSync(elsewhere.path, { recursive: true });
  });

  test.each([0, 1])("what was changed while node %d was down reaches every member", async (at) => {
    const node = nodeAt(at);
    const folder = `down${at}`;
    const files: Files = { file: "the first", gone: "x", "sub/a": "1", "sub/b": "2", same: "same" };
    for (const [name, content] of Object.entries(files)) writeTree(node.root, { [`${folder}/${name}`]: content });
    await reachesAll(cluster, node, folder);
    await node.server.stop("SIGTERM");
    const path = join(node.root, folder);
    writeFileSync(join(path, "file"), "the second");
    unlinkSync(join(path, "gone"));
    renameSync(join(path, "sub"), join(path, "moved"));
    writeTree(path, { "new/file": randomBytes(300_000, 5) });
    await node.start();
    await cluster.live();
    const after = await reachesAll(cluster, node, folder);
    expect(after.map((line) => line.split(" ")[0])).toEqual([
      "file",
      "moved",
      "moved/a",
      "moved/b",
      "new",
      "new/file",
      "same",
    ]);
  });

  test("a client that asks another member at once gets what was put, 100 times", async () => {
    const random = seeded(5);
    const remotes = cluster.nodes.map(remoteOf);
    const sizes = [1, 100, 4096, 65_536, 262_144, 262_145, 1_000_000, 5_000_000];
    const known = new Map<string, Uint8Array>();
    try {
      for (let round = 0; round < 100; round++) {
        const path = `asked/${random(3)}/${random(6)}`;
        const content = randomBytes(sizes[random(random(4) > 0 ? 6 : sizes.length)]!, round + 1);
        const at = random(3);
        const { etag, size } = await put(remotes[at]!, path, content, 1.6e15 + round * 1e6);
        known.set(path, content);
        const other = remotes[(at + 1 + random(2)) % 3]!;
        expect([round, await other.stat(path)]).toEqual([
          round,
          { kind: "file", size, mtime: 1.6e15 + round * 1e6, etag },
        ]);
        expect([round, (await read(other, path)).equals(content)]).toEqual([round, true]);
        const all = await namesIn(remotes[random(3)]!, "asked", true);
        const paths = [...known.keys()].map((path) => path.slice("asked/".length)).sort();
        expect([round, all.filter((name) => name.includes("/")).sort()]).toEqual([round, paths]);
      }
      for (const remote of remotes)
        for (const [path, content] of known) expect((await read(remote, path)).equals(content)).toBe(true);
    } finally {
      for (const remote of remotes) remote.close();
    }
  });

  test("a file that was removed or renamed through one is not found through another at once", async () => {
    const remotes = cluster.nodes.map(remoteOf);
    try {
      for (let round = 0; round < 30; round++) {
        const [one, other] = [remotes[round % 3]!, remotes[(round + 1) % 3]!];
        await put(one, "short/lived", randomBytes(10, round + 1));
        await other.move("short/lived", "short/renamed");
        expect((await one.stat("short/renamed")).size).toBe(10);
        expect(await one.stat("short/lived").catch(({ code }) => code)).toBe("not_found");
        await one.remove("short/renamed");
        expect(await other.stat("short/renamed").catch(({ code }) => code)).toBe("not_found");
        expect(await namesIn(other, "short")).toEqual([]);
        await other.remove("short", true);
        expect(await namesIn(one, "short").catch(({ code }) => code)).toBe("not_found");
      }
    } finally {
      for (const remote of remotes) remote.close();
    }
  });

  test("get -r at once after put -r misses nothing", async () => {
    const files: Files = { "big/a": randomBytes(3_000_000, 7), "big/b": randomBytes(900_000, 8), "none/": "" };
    for (let count = 0; count < 300; count++) files[`d${count % 5}/f${count}`] = `${count}`;
    using tree = makeRoot(files);
    using got = temporaryFolder();
    for (const [from, to] of [
      [0, 1],
      [1, 2],
      [2, 0],
    ] as const) {
      const name = `r${from}`;
      const putting = await runClient(nodeAt(from).server.address, ["put", "-q", "-r", tree.path, "-t", name]);
      expect([putting.status, putting.errors]).toEqual([0, ""]);
      const getting = await runClient(nodeAt(to).server.address, ["get", "-q", "-r", name, "-d", got.path]);
      expect([getting.status, getting.errors]).toEqual([0, ""]);
      expect(treeOf(join(got.path, name))).toEqual(treeOf(tree.path));
    }
  });

  test("renamed and copied content moves no bytes between members", async () => {
    const [a, b, c] = cluster.nodes as [Node, Node, Node];
    const files: Files = {};
    for (let count = 0; count < 8; count++) files[`large${count}`] = randomBytes(MIB, 900 + count);
    for (let count = 0; count < 400; count++) files[`small/${count}`] = `small ${count}`;
    for (const [name, content] of Object.entries(files)) writeTree(b.root, { [`bytes/${name}`]: content });
    await reachesAll(cluster, b, "bytes");
    const sent = () => bytesOf(getsOf(cluster.nodes, "bytes"));
    const total = Object.values(files).reduce((sum, content) => sum + content.length, 0);
    await waitFor("what was sent is logged", () => sent() === 2 * total);
    await cluster.settled();
    const remote = remoteOf(c);
    await remote.move("bytes", "bytes2");
    remote.close();
    await reachesAll(cluster, c, "bytes2");
    await reachesAll(cluster, c, "bytes");
    await cluster.settled();
    renameSync(join(a.root, "bytes2"), join(a.root, "bytes3"));
    await reachesAll(cluster, a, "bytes3");
    await reachesAll(cluster, a, "bytes2");
    await cluster.settled();
    // Whole from the first: of what is found half written the others may ask for what it is by then.
    using elsewhere = temporaryFolder(join(b.root, "..", ".."));
    cpSync(join(b.root, "bytes3"), join(elsewhere.path, "bytes4"), { recursive: true });
    renameSync(join(elsewhere.path, "bytes4"), join(b.root, "bytes4"));
    await reachesAll(cluster, b, "bytes4");
    await cluster.settled();
    utimesSync(join(a.root, "bytes4/large0"), 1, 1);
    await reachesAll(cluster, a, "bytes4");
    expect(treeIn(c, "bytes4").length).toBe(409);
    // What was sent before that is logged by now.
    await reachesAll(cluster, b, "bytes4");
    expect(sent()).toBe(2 * total);
  });

  test("a download goes on at another member with the same etag", async () => {
    const [, b, c] = cluster.nodes as [Node, Node, Node];
    using folder = temporaryFolder();
    const digest = writeLargeFile(join(b.root, "resumed.bin"), 12 * MIB, 77);
    await cluster.settled();
    const remotes = cluster.nodes.map(remoteOf);
    const etags = await Promise.all(remotes.map(async (remote) => (await remote.stat("resumed.bin")).etag));
    for (const remote of remotes) remote.close();
    expect(new Set(etags).size).toBe(1);
    const file = join(folder.path, "resumed.bin");
    const args = ["get", "resumed.bin", "-q", "-d", folder.path];
    const child = spawnClient(b.server.address, [...args, "--limit-rate", "2M"]);
    const bytes = () => loggedIn(`${file}.resume.json`);
    await waitFor("some of it has come", () => bytes() > 2 * MIB);
    child.kill("SIGKILL");
    await child.exited;
    const held = bytes();
    const run = await runClient(c.server.address, args);
    expect([run.status, run.errors]).toEqual([0, ""]);
    expect(await sha256(file)).toBe(digest);
    const rest = await waitFor("it is logged", () =>
      c.server.log.find(({ event, path, offset = 0 }) => event === "get" && path === "resumed.bin" && offset > 0),
    );
    expect([rest.offset, rest.bytes]).toEqual([held, 12 * MIB - held]);
  });

  test("get --segments takes ranges from several members", async () => {
    using folder = temporaryFolder();
    const digest = writeLargeFile(join(cluster.master.root, "segments.bin"), 24 * MIB, 78);
    await cluster.settled();
    const from = () => getsOf(cluster.replicas, "segments.bin").length;
    const before = from();
    const args = ["get", "segments.bin", "-q", "-d", folder.path, "--segments", "4"];
    const run = await runClient(cluster.address, args);
    expect([run.status, run.errors]).toEqual([0, ""]);
    expect(await sha256(join(folder.path, "segments.bin"))).toBe(digest);
    await waitFor("four ranges are logged", () => from() >= before + 4);
    for (const { server } of cluster.replicas) {
      const ranges = server.log.filter(({ event, path, bytes = 0 }) => {
        return event === "get" && path === "segments.bin" && bytes < 24 * MIB && bytes > 0;
      });
      expect(ranges.length).toBeGreaterThan(0);
    }
  });

  test("a file that goes on changing while it is hashed settles to its last content everywhere", async () => {
    const [, b] = cluster.nodes as [Node, Node];
    const path = join(b.root, "busy/log");
    writeTree(b.root, { "busy/log": randomBytes(3 * MIB, 3) });
    for (let count = 0; count < 200; count++) {
      appendFileSync(path, `line ${count}\n`);
      await Bun.sleep(5);
    }
    const tree = await reachesAll(cluster, b, "busy");
    expect(tree.map((line) => line.split(" ")[0])).toEqual(["log"]);
    expect(readFileSync(join(cluster.master.root, "busy/log"), "latin1")).toEndWith("line 199\n");
  });
});

// ---------------------------------------------------------------------------------------------------- interruptions

describe("interruptions", () => {
  test("a member that is killed while it fetches a large file goes on where it was", async () => {
    await using cluster = await startCluster({ replicas: 2, args: ["--writable", "--limit-rate", "12M"] });
    const [, b, c] = cluster.nodes as [Node, Node, Node];
    const size = 64 * MIB;
    const digest = writeLargeFile(join(b.root, "large.bin"), size, 11);
    const staging = join(c.root, ".reprise");
    const staged = () => readdirSync(staging).find((name) => /^put-[0-9a-f]{32}$/.test(name));
    const held = () => sizeOf(join(staging, staged() ?? "none"));
    await waitFor("a third of it has come", () => held() > size / 3);
    await killAll(c);
    const before = held();
    expect(before).toBeLessThan(size);
    await c.start();
    await cluster.settled();
    expect(await sha256(join(c.root, "large.bin"))).toBe(digest);
    const offsets = () =>
      getsOf([cluster.master, b], "large.bin").filter(({ offset = 0, bytes = 0 }) => offset > 0 && bytes > 0);
    const rest = await waitFor("it is logged", () => offsets()[0]);
    expect([rest.offset, rest.bytes]).toEqual([before, size - before]);
  });

  test("bytes that are damaged on the way do not land", async () => {
    await using cluster = await startCluster({ replicas: 1 });
    const [a] = cluster.nodes as [Node, Node];
    let damaged = 0;
    const flipAt = 200_000;
    using proxy = startProxy({
      target: a.server.port,
      toClient: (bytes, offset) => {
        if (offset <= flipAt && offset + bytes.length > flipAt && damaged < 3) {
          damaged++;
          const copy = new Uint8Array(bytes);
          copy[flipAt - offset]! ^= 4;
          return copy;
        }
        return bytes;
      },
    });
    const c = await cluster.add({}, undefined, ["--join", proxy.address]);
    await cluster.live();
    const digest = writeLargeFile(join(a.root, "large.bin"), 4 * MIB, 12);
    const found = new Set<string>();
    await waitFor("it is there", async () => {
      if (!readdirSync(c.root).includes("large.bin")) return false;
      found.add(await sha256(join(c.root, "large.bin")));
      return true;
    });
    await cluster.settled();
    expect([...found]).toEqual([digest]);
    expect(damaged).toBeGreaterThan(0);
  });

  test("a download goes on when the replica that serves it is killed, 20 times", async () => {
    const size = 6 * MIB;
    using folder = temporaryFolder();
    const source = join(folder.path, "source");
    const digest = writeLargeFile(source, size, 13);
    await using cluster = await startCluster({ replicas: 3, args: ["--writable", "--limit-rate", "4M"] });
    cpSync(source, join(cluster.master.root, "film"));
    await cluster.settled();
    const whole = readFileSync(source);
    for (let round = 0, tries = 0; round < 20; tries++) {
      const file = join(folder.path, `got${tries}`);
      const way = round % 3;
      const more = way === 2 ? ["--segments", "3"] : [];
      const args = way === 1 ? ["cat", "film"] : ["get", "film", "-o", file, ...more];
      const before = cluster.master.server.log.filter(({ event }) => event === "redirect").length;
      const client = spawnClient(cluster.address, [...args, "-q"]);
      const out = new Response(client.stdout).bytes();
      const errors = new Response(client.stderr).text();
      const sent = await waitFor("it is sent to one", () => {
        return cluster.master.server.log.filter(({ event }) => event === "redirect")[before]?.to;
      });
      const victim = cluster.replicas.find(({ server }) => server.address === sent)!;
      const part = `${file}.part`;
      const isMiddle = () => sizeOf(part) > MIB || client.exitCode !== null;
      if (way !== 1) await waitFor("some of it has come", isMiddle);
      // At a limited rate: what it takes for a connection is all that a test sees of a pipe that is read to its end.
      else await waitFor("it is connected", async () => (await victim.status().catch(() => undefined)) !== undefined);
      // It was done before we looked: that is no round.
      if (client.exitCode !== null) continue;
      await killAll(victim);
      expect([round, await client.exited, await errors]).toEqual([round, 0, ""]);
      round++;
      if (way === 1) expect((await out).length === size && whole.equals(await out)).toBe(true);
      else expect(await sha256(file)).toBe(digest);
      await victim.start();
      await cluster.live();
    }
  });

  test("what a member has taken with it can be written anew through any other, and both are kept", async () => {
    await using cluster = await startCluster({ replicas: 1 });
    // Nobody has all of the file before it goes.
    const c = await cluster.add({}, cluster.master, ["--limit-rate", "100K"]);
    await cluster.live();
    const [a, b] = cluster.nodes as [Node, Node];
    writeTree(b.root, { "d/held": "before" });
    await reachesAll(cluster, b, "d");
    await cluster.settled();
    const lost = randomBytes(8 * MIB, 21);
    writeFileSync(join(c.root, "d/held"), lost);
    const remote = remoteOf(b);
    await waitFor("the other knows of it", async () => (await remote.stat("d/held")).size === lost.length);
    await killAll(c);
    expect((await put(remote, "d/held", Buffer.from("written anew"))).size).toBe(12);
    remote.close();
    const args = ["--writable", "--join", cluster.address];
    c.server = await startServer(c.root, { args, port: c.server.port });
    await cluster.live();
    const names = () => readdirSync(join(a.root, "d"));
    await waitFor("both are there", () => names().length === 2);
    await cluster.settled();
    const hashes = await Promise.all(names().map((name) => sha256(join(a.root, "d", name))));
    const hashOf = (content: Uint8Array) => new Bun.CryptoHasher("sha256").update(content).digest("hex");
    expect(hashes.sort()).toEqual([Buffer.from("written anew"), lost].map(hashOf).sort());
  });

  test("--server tries the next master", async () => {
    await using cluster = await startCluster({ replicas: 1, files: { file: "content" } });
    await using other = await startCluster({ replicas: 0, files: { file: "other" } });
    const both = `${other.address},${cluster.address}`;
    expect((await runClient(both, ["cat", "file"])).output).toBe("other");
    await killAll(other.master);
    expect(await runClient(both, ["cat", "-q", "file"])).toMatchObject({ status: 0, output: "content", errors: "" });
  });

  test("what was put through a replica that dies is on all, or the client says that it is not", async () => {
    await using cluster = await startCluster({ replicas: 3, args: ["--writable", "--limit-rate", "8M"] });
    using folder = temporaryFolder();
    const size = 8 * MIB;
    for (let round = 0; round < 6; round++) {
      const name = `up${round}`;
      const digest = writeLargeFile(join(folder.path, name), size, 100 + round);
      const before = cluster.master.server.log.filter(({ event }) => event === "redirect").length;
      const args = ["put", "-q", name, ...(round === 5 ? ["--retries", "0"] : [])];
      const client = spawnClient(cluster.address, args, { cwd: folder.path });
      const errors = new Response(client.stderr).text();
      const sent = await waitFor("it is sent to one", () => {
        return cluster.master.server.log.filter(({ event }) => event === "redirect")[before]?.to;
      });
      const victim = cluster.replicas.find(({ server }) => server.address === sent)!;
      const staging = join(victim.root, ".reprise");
      const staged = () => readdirSync(staging).filter((name) => name.startsWith("put-") && !name.endsWith(".lock"));
      const isNamed = () => readdirSync(victim.root).includes(name);
      if (round % 2 === 0)
        await waitFor("some of it is there, if not all by now", () => {
          return isNamed() || staged().some((name) => sizeOf(join(staging, name)) > MIB);
        });
      // All of it is there, and not yet acknowledged, or just so.
      else await waitFor("it has its name", isNamed);
      await killAll(victim);
      const status = await client.exited;
      if (status !== 0) expect(await errors).not.toBe("");
      if (round !== 5) expect([round, status, await errors]).toEqual([round, 0, ""]);
      const alive = cluster.nodes.filter((node) => node !== victim);
      await cluster.live(2);
      if (status === 0) {
        await waitFor("all that are there have it", async () => {
          const digests = await Promise.all(alive.map(({ root }) => sha256(join(root, name)).catch(() => "")));
          return digests.every((found) => found === digest);
        });
      }
      await victim.start();
      await cluster.live();
      const tree = await cluster.settled();
      expect(tree.filter((line) => line.includes(".conflict-"))).toEqual([]);
      if (status === 0) expect(await sha256(join(victim.root, name))).toBe(digest);
    }
  });
});

// ---------------------------------------------------------------------------------------------------- conflicts

describe("conflicts", () => {
  const LONG = `${"ü".repeat(120)}.tar.gz`;
  type Sides = [b: string | null, c: string | null, a?: string];
  /** What each side makes of a file that was "before", null for a deletion; what the folder then has, in any order. */
  const CASES: Record<string, { name?: string; sides: Sides; remains: string[] }> = {
    "both change": { sides: ["by b", "by c"], remains: ["by b", "by c"] },
    "three ways": { sides: ["by b", "by c", "by a"], remains: ["by a", "by b", "by c"] },
    "change against deletion": { sides: ["by b", null], remains: ["by b"] },
    "deletion against change": { sides: [null, "by c"], remains: ["by c"] },
    "deletion on both": { sides: [null, null], remains: [] },
    "the same on both": { sides: ["same", "same"], remains: ["same"] },
    "a long name": { name: LONG, sides: ["by b", "by c"], remains: ["by b", "by c"] },
    dots: { name: "a.b..c.d", sides: ["by b", "by c"], remains: ["by b", "by c"] },
    unicode: { name: "ファイル 🙂.ęxt", sides: ["by b", "by c"], remains: ["by b", "by c"] },
    "no extension": { name: "Makefile", sides: ["by b", "by c"], remains: ["by b", "by c"] },
  };

  async function separated(work: (cluster: Cluster, b: Node, c: Node) => void | Promise<void>, before: Files) {
    const cluster = await startCluster({ replicas: 2, files: before });
    const [, b, c] = cluster.nodes as [Node, Node, Node];
    await cluster.settled();
    await cluster.master.kill();
    await waitFor("both know", async () => (await b.status()).problem && (await c.status()).problem);
    await work(cluster, b, c);
    // By a look at their own trees, or when they start next.
    await cluster.master.start();
    await cluster.live();
    await cluster.settled();
    return cluster;
  }

  test("what two or three change while they are separated has one winner, and a copy of each other", async () => {
    const before: Files = {};
    for (const [what, { name = "file.txt" }] of Object.entries(CASES)) before[`${what}/${name}`] = "before";
    const change = ({ root }: Node, path: string, content: string | null | undefined) => {
      if (content === null) unlinkSync(join(root, path));
      else if (content !== undefined) writeFileSync(join(root, path), content);
    };
    await using cluster = await separated(({ master }, b, c) => {
      for (const [what, { name = "file.txt", sides }] of Object.entries(CASES)) {
        const path = `${what}/${name}`;
        change(b, path, sides[0]);
        change(c, path, sides[1]);
        change(master, path, sides[2]);
        if (what === "the same on both") for (const { root } of [b, c]) utimesSync(join(root, path), 1, 77);
      }
    }, before);
    const [a] = cluster.nodes as [Node];
    await waitFor("nothing more comes of it", () => {
      return Object.entries(CASES).every(([what, { remains }]) => {
        return Bun.deepEquals(Object.values(ifStill(() => filesIn(a, what)) ?? {}).sort(), remains);
      });
    });
    await cluster.settled();
    for (const [what, { name = "file.txt", remains }] of Object.entries(CASES)) {
      const names = Object.keys(filesIn(a, what));
      expect([what, Object.values(filesIn(a, what)).sort()]).toEqual([what, remains]);
      if (remains.length > 0) expect(names).toContain(name);
      for (const copy of names.filter((found) => found !== name)) {
        const extension = name.lastIndexOf(".") > 0 ? name.slice(name.lastIndexOf(".")) : "";
        expect(copy).toMatch(/\.conflict-[0-9a-f]{8}-\d{8}T\d{6}Z/);
        expect(copy).toEndWith(extension);
        if (name !== LONG) expect(copy).toStartWith(`${extension ? name.slice(0, -extension.length) : name}.conflict-`);
      }
    }
  });

  test("only another time on both is no conflict", async () => {
    await using cluster = await separated(
      (_, b, c) => {
        utimesSync(join(b.root, "file"), 1, 1000);
        utimesSync(join(c.root, "file"), 1, 2000);
      },
      { file: "content" },
    );
    const times = () =>
      ifStill(() => cluster.nodes.map(({ root }) => Math.round(statSync(join(root, "file")).mtimeMs))) ?? [];
    await waitFor("all have one", () => new Set(times()).size === 1 && [1e6, 2e6].includes(times()[0]!));
    expect((await cluster.settled()).length).toBe(1);
  });

  test("a folder against a file, and what is in it, are all kept", async () => {
    await using cluster = await separated(
      (_, b, c) => {
        writeTree(b.root, { "new/in/it": "of b", old2: "x", file2: "b" });
        writeFileSync(join(c.root, "new"), "of c");
        rmSync(join(b.root, "old"), { recursive: true });
        writeFileSync(join(b.root, "old"), "a file of b");
        writeTree(c.root, { "old/more": "of c, in the folder" });
        unlinkSync(join(c.root, "file"));
        writeTree(c.root, { "file/in": "of c, for a file" });
        writeFileSync(join(b.root, "file"), "changed by b");
      },
      { "old/one": "1", file: "before" },
    );
    const contents = (): string[] => {
      const tree = readdirSync(cluster.master.root, { recursive: true, withFileTypes: true });
      const files = tree.filter((entry) => entry.isFile() && !entry.parentPath.includes(".reprise"));
      return files.map(({ parentPath, name }) => readFileSync(join(parentPath, name), "utf8")).sort();
    };
    const all = ["a file of b", "b", "changed by b", "of b", "of c", "of c, for a file", "of c, in the folder", "x"];
    await waitFor("all is there", () => Bun.deepEquals(ifStill(contents), all.sort()));
    await cluster.settled();
    expect(contents()).toEqual(all.sort());
  });
});

// ---------------------------------------------------------------------------------------------------- coming back

describe("coming back", () => {
  const gone = ({ root }: Node, path: string) => !readdirSync(root).includes(path);

  test("what was deleted while a member was away stays deleted", async () => {
    await using cluster = await startCluster({ replicas: 2, files: { one: "1", "two/in": "2", three: "3" } });
    const [, b, c] = cluster.nodes as [Node, Node, Node];
    await cluster.settled();
    await c.server.stop("SIGTERM");
    const remote = remoteOf(b);
    await remote.remove("one");
    await remote.remove("two", true);
    remote.close();
    await c.start();
    await cluster.live();
    expect((await cluster.settled()).map((line) => line.split(" ")[0])).toEqual(["three"]);
  });

  test("a member that was away longer than deletions are remembered brings nothing back but its own changes", async () => {
    const files = { stays: "0", one: "1", "two/in": "2", "two/in2": "2", changed: "3", both: "4" };
    await using cluster = await startCluster({ replicas: 2, files });
    const [a, b, c] = cluster.nodes as [Node, Node, Node];
    await cluster.settled();
    await c.server.stop("SIGTERM");
    for (const name of ["one", "two", "both"]) rmSync(join(b.root, name), { recursive: true });
    await waitFor("they are gone", () => ["one", "two", "both"].every((name) => gone(a, name)));
    await cluster.settled([a, b]);
    await a.server.stop("SIGTERM");
    const ledger = new EmbeddedLedger(join(a.root, ".reprise/ledger.sqlite"));
    // As if a month had passed without the member.
    ledger.prune(ledger.revision, Date.now() + 31 * 24 * 3600 * 1000);
    expect(ledger.pruned).toBeGreaterThan(0);
    ledger.close();
    writeTree(c.root, { changed: "by c", "own/new": "of c", both: "changed by c" });
    await a.start();
    await c.start();
    await cluster.live();
    await waitFor("its changes are there", () => ["changed", "own", "both"].every((name) => !gone(a, name)));
    await cluster.settled();
    expect(filesIn(a, "")).toEqual(
      expect.objectContaining({ stays: "0", changed: "by c", own: "(folder)", both: "changed by c" }),
    );
    expect((await cluster.settled()).map((line) => line.split(" ")[0])).toEqual([
      "both",
      "changed",
      "own",
      "own/new",
      "stays",
    ]);
  });

  test("a root with files that joins first becomes part of the tree", async () => {
    await using cluster = await startCluster({
      replicas: 1,
      files: { "same.txt": "same", "other.txt": "of a", a: "a" },
    });
    const [a] = cluster.nodes as [Node];
    await cluster.settled();
    const c = await cluster.add({ "same.txt": "same", "other.txt": "of c", c: "c", "folder/d": "d" });
    await cluster.live();
    await waitFor(
      "it has come",
      () => !gone(a, "c") && Object.values(ifStill(() => filesIn(a, "")) ?? {}).includes("of c"),
    );
    const names = (await cluster.settled()).map((line) => line.split(" ")[0]!);
    const copy = names.find((name) => name.includes(".conflict-"))!;
    expect(names).toEqual(["a", "c", "folder", "folder/d", copy, "other.txt", "same.txt"].sort());
    expect(copy).toMatch(/^other\.conflict-[0-9a-f]{8}-\d{8}T\d{6}Z\.txt$/);
    expect([filesIn(a, "")["other.txt"], filesIn(a, "")[copy]]).toEqual(["of a", "of c"]);
    expect(getsOf(cluster.nodes, "same.txt").map(({ peer }) => peer).length).toBe(1);
    expect(gone(c, "a")).toBe(false);
  });
});

// ---------------------------------------------------------------------------------------------------- hindrances

describe("hindrances", () => {
  test("a member whose disk is full says so, the others go on, and it catches up", async () => {
    if (process.getuid?.() !== 0) return console.log("skipped: only root may mount a small disk");
    using disk = mountSmall("12m");
    if (!disk) return;
    await using cluster = await startCluster({ replicas: 1 });
    await using full = await startServer(disk.path, {
      args: ["--writable", "--keep-free", "0", "--join", cluster.address],
    });
    await waitFor("it is live", async () => {
      return (await cluster.master.status()).replicas.every(({ state }) => state === "live");
    });
    const [a, b] = cluster.nodes as [Node, Node];
    writeLargeFile(join(b.root, "one"), 7 * MIB, 1);
    writeLargeFile(join(b.root, "two"), 7 * MIB, 2);
    const said = await waitFor("status says it", async () => {
      const { replicas } = await a.status();
      return replicas.find(({ address, problem }) => address === full.address && problem !== undefined);
    });
    expect([said.state, said.lag > 0]).toEqual(["live", true]);
    expect(said.problem).toStartWith("no room on the server for ");
    // Of one file now, and of the other then.
    await waitFor("the command shows it", async () => {
      return (await runClient(cluster.address, ["status"])).output.includes("no room on the server for ");
    });
    await waitFor("it is logged", () => full.stderr().includes("; it is tried again"));
    expect(said.problem).not.toContain("put it again");
    const remote = remoteOf(b);
    await put(remote, "small", randomBytes(1000, 3));
    remote.close();
    await waitFor("small ones still come", () => readdirSync(disk.path).includes("small"));
    // What is not there is had from who has it.
    for (const name of ["one", "two"]) {
      const run = await runClient(full.address, ["cat", "-q", name]);
      expect([run.status, run.stdout.length]).toEqual([0, 7 * MIB]);
    }
    unlinkSync(join(a.root, "one"));
    await waitFor("it has caught up", () => {
      const [here, there] = [disk.path, b.root].map((root) => ifStill(() => treeOf(root)));
      return here && Bun.deepEquals(here, there);
    });
    await waitFor("status says so", async () => {
      return (await a.status()).replicas.every(({ problem, lag }) => problem === undefined && lag === 0);
    });
    await waitFor("it is logged", () => full.stderr().includes("nothing keeps the files here behind any more"));
    expect(readdirSync(disk.path).sort()).toEqual([".reprise", "small", "two"]);
  });

  test("a name that a member cannot have is said in status, and all else goes on", async () => {
    await using cluster = await startCluster({ replicas: 2 });
    const [a, b, c] = cluster.nodes as [Node, Node, Node];
    // A link is nobody's to replace: the name cannot be had here.
    symlinkSync("/nowhere", join(c.root, "name"));
    writeTree(b.root, { name: "of b", "other/one": "1" });
    const said = await waitFor("status says it", async () => {
      const { replicas } = await a.status();
      return replicas.find(({ address, problem }) => address === c.server.address && problem !== undefined);
    });
    expect(said.problem).toContain("name");
    await reachesAll(cluster, b, "other");
    writeTree(b.root, { "other/two": "2" });
    await reachesAll(cluster, b, "other");
    const run = await runClient(c.server.address, ["cat", "-q", "name"]);
    expect([run.status, run.output]).toEqual([0, "of b"]);
    // Also one that comes with it from the start is of use.
    await c.server.stop("SIGTERM");
    await c.start();
    await cluster.live();
    unlinkSync(join(c.root, "name"));
    await cluster.settled();
  });

  test("clocks that differ", async () => {
    const faketime = Bun.which("faketime");
    if (!faketime) return console.log("skipped: faketime is not installed");
    await using cluster = await startCluster({ replicas: 1 });
    using root = makeRoot({});
    const args = ["--writable", "--join", cluster.address];
    // What it sets, so that the server is our own child; its own clock alone, and not the times of files.
    const { stdout } = Bun.spawnSync([faketime, "-f", "-5h", "printenv", "LD_PRELOAD"]);
    const env = { LD_PRELOAD: stdout.toString().trim(), FAKETIME: "-5h", NO_FAKE_STAT: "1" };
    await using late = await startServer(root.path, { args, env });
    expect(Date.now() - Date.parse((await waitFor("it has joined", () => late.log.at(-1))).time!)).toBeGreaterThan(4e6);
    writeTree(cluster.replicas[0]!.root, { one: "1" });
    await waitFor("it has it", () => {
      const [here, there] = [root.path, cluster.replicas[0]!.root].map((root) => ifStill(() => treeOf(root)));
      return here && Bun.deepEquals(here, there);
    });
    writeFileSync(join(root.path, "one"), "changed");
    const atMaster = () => ifStill(() => readFileSync(join(cluster.master.root, "one"), "utf8"));
    await waitFor("all have it", () => atMaster() === "changed");
    expect((await statusOf(late.address)).problem).toBeUndefined();
  });
});
