/** The keeper of a cluster among hostile members, lost files and a tree that goes away: parts by themselves, and real servers. */
import { Database } from "bun:sqlite";
import { describe, expect, setDefaultTimeout, test } from "bun:test";
import { copyFileSync, existsSync, mkdirSync, readFileSync, rmSync, statSync, writeFileSync } from "node:fs";
import { join } from "node:path";
import { openChanges } from "../changes.ts";
import { Index } from "../index.ts";
import { EmbeddedLedger, FOLDER, GONE, type Version } from "../ledger.ts";
import { call, type Join, readFromMaster, readFromMember, Up } from "../link.ts";
import { Placer } from "../place.ts";
import { type ErrorCode, encodeLink, MAX_CONTENT_BYTES, RepriseError } from "../protocol.ts";
import type { Event } from "../replica.ts";
import { type Folder, openFolder } from "../storage.ts";
import { addToken } from "../tokens.ts";
import { hashOf, Observer } from "../watch.ts";
import { startCluster, statusOf } from "./clusters.ts";
import {
  childrenOf,
  HOME,
  makeRoot,
  randomBytes,
  runClient,
  signal,
  startFakeServer,
  startServer,
  TEST_MS,
  waitFor,
} from "./fixtures.ts";

setDefaultTimeout(TEST_MS);

function joinOf(node: string, port: number): Join {
  return {
    kind: "join",
    version: 1,
    store: "folder",
    node,
    host: "127.0.0.1",
    port,
    secret: "s".repeat(43),
    below: [],
  };
}

/** What a server answers to who joins it with a token. */
async function joinWith(address: string, token: string | undefined, node = "stranger"): Promise<ErrorCode | "joined"> {
  const [host, port] = address.split(":");
  const { promise, resolve } = Promise.withResolvers<ErrorCode | "joined">();
  const up = new Up({
    address: { host: host!, port: Number(port) },
    token,
    ca: undefined,
    join: () => joinOf(node, Number(port)),
    onJoined: () => resolve("joined"),
    onMessage: () => {},
    onLost: ({ code }) => resolve(code),
  });
  void up.run();
  const answer = await promise;
  up.close();
  return answer;
}

const SHA = "a".repeat(64);
const file = { kind: "file", size: 1, mtime: 1, sha256: SHA };

test("a reader that holds the index up for a moment is waited for, whatever was read before a change", async () => {
  using root = makeRoot({});
  const path = join(root.path, "index.sqlite");
  const index = new Index(path);
  // So does a worker that has met the index while the keeper was about to note a change in it.
  const hold = `const db = new (require("bun:sqlite").Database)(${JSON.stringify(path)});
    db.run("BEGIN IMMEDIATE");
    console.log("held");
    Bun.sleepSync(300);
    db.run("COMMIT");`;
  await using holder = Bun.spawn([process.execPath, "-e", hold], { stdio: ["ignore", "pipe", "inherit"] });
  for await (const _ of holder.stdout) break;
  index.transaction(() => {
    expect(index.fact("cursor")).toBeUndefined();
    index.setFact("cursor", 1);
  });
  expect(index.fact("cursor")).toBe(1);
  expect(await holder.exited).toBe(0);
  index.close();
});

describe("a LINK that is not what it should be", () => {
  const join = { kind: "join", version: 1, store: "folder", node: "n", host: "", port: 1, secret: "s".repeat(43) };
  const propose = (proposals: unknown) => ({ kind: "propose", id: 1, origin: "n", proposals });
  const stretch = (more: unknown) => ({ kind: "stretch", pruned: 0, stretch: more });
  const record = { ...file, path: "a", revision: 1, origin: "n", over: "" };

  test("is told from one that is", () => {
    expect(readFromMember(join)).toEqual(join as never);
    expect(readFromMember(propose([{ path: "a", base: 0, version: file }]))).toMatchObject({ id: 1 });
    expect(readFromMaster(stretch({ after: 0, revision: 1, records: [record] }))).toMatchObject({ pruned: 0 });
  });

  const bad: { [what: string]: () => unknown } = {
    "no version": () => readFromMember(propose([{ path: "a", base: 0 }])),
    "a version of null": () => readFromMember(propose([{ path: "a", base: 0, version: null }])),
    "a proposal of null": () => readFromMember(propose([null])),
    "a digest in a list": () => readFromMember(propose([{ path: "a", base: 0, version: { ...file, sha256: [SHA] } }])),
    "a hidden path": () => readFromMember(propose([{ path: ".reprise/x", base: 0, version: file }])),
    "a path that leads out": () => readFromMember(propose([{ path: "../x", base: 0, version: file }])),
    "an empty secret": () => readFromMember({ ...join, secret: "" }),
    "no stretch": () => readFromMaster({ kind: "stretch", pruned: 0 }),
    "a stretch of null": () => readFromMaster(stretch(null)),
    "a record of null": () => readFromMaster(stretch({ after: 0, revision: 1, records: [null] })),
    "a decision of null": () => readFromMaster({ kind: "decided", id: 1, decisions: [null] }),
    "a decision without a number": () => readFromMaster({ kind: "decided", id: 1, decisions: [{}] }),
    "an empty secret of the master": () => readFromMaster({ kind: "joined", node: "n", ledger: "l", secret: "" }),
  };
  for (const [what, read] of Object.entries(bad)) {
    test(`is refused: ${what}`, () => expect(read).toThrow(RepriseError));
  }
});

describe("a master without its index", () => {
  test("takes a log of many records in that has forgotten deletions", async () => {
    using root = makeRoot({ "new.txt": "new" });
    mkdirSync(`${root.path}/.reprise`, { recursive: true });
    const ledger = new EmbeddedLedger(`${root.path}/.reprise/ledger.sqlite`);
    const propose = (path: string, version: Version) => ({ path, base: ledger.newest(path)?.revision ?? 0, version });
    const names = Array.from({ length: 1200 }, (_, number) => `folder${number}`);
    ledger.append(
      "another",
      names.map((name) => propose(name, FOLDER)),
    );
    ledger.append("another", [propose("folder7", GONE)]);
    ledger.prune(ledger.revision);
    expect(ledger.pruned).toBeGreaterThan(0);
    ledger.close();

    await using server = await startServer(root.path, { args: ["--writable"] });
    await waitFor("it has all of the log", async () => (await statusOf(server.address)).revision > 1200);
    const { status, errors } = await runClient(server.address, ["put", `${root.path}/new.txt`, "-t", ""]);
    expect({ status, errors }).toMatchObject({ status: 0 });
    const { output } = await runClient(server.address, ["ls"]);
    expect(output).toContain("folder1199");
    expect(output).not.toContain("folder7/");
  });
});

describe("what members know each other by", () => {
  test("answers a call, and lets nobody join", async () => {
    using root = makeRoot({ "a.txt": "a" });
    using folder = makeRoot({});
    const tokens = `${folder.path}/tokens.json`;
    const token = addToken(tokens, { name: "b", access: "replica", folder: "" });
    await using server = await startServer(root.path, { args: ["--tokens", tokens] });
    // The first who joins makes the server a master; nobody answers for that one where it says it is.
    expect(await joinWith(server.address, token)).toBe("refused");
    const secret = String(new Index(`${root.path}/.reprise/index.sqlite`).fact("secret"));
    const node = new Index(`${root.path}/.reprise/index.sqlite`).node;
    const [host, port] = server.address.split(":");
    await call({ host: host!, port: Number(port), token: secret, ca: undefined, node });
    expect(await joinWith(server.address, secret)).toBe("denied");
  });
});

describe("a file that has only another time", () => {
  /** A placer that is to set the time of a.txt, and what it has told. */
  async function retime(path: string, root: Folder) {
    mkdirSync(`${path}/.reprise`, { recursive: true });
    const index = new Index(`${path}/.reprise/index.sqlite`);
    const { version, etag } = await hashOf(openFolder(path), "a.txt");
    const target = { ...version, path: "a.txt", mtime: 1_000_000_000_000_000, revision: 2, origin: "b", over: "" };
    index.set({ path: "a.txt", base: 1, known: version, seen: version, etag, sent: undefined, target, passed: [] });
    const told: Event[] = [];
    const placer = new Placer({
      root,
      changes: openChanges(path),
      index,
      state: { node: "a", entries: index, cursor: 2, online: true, snapshot: undefined },
      holdersOf: () => [],
      isEveryoneHere: () => false,
      connectTo: () => {
        throw new Error("nobody is asked");
      },
      take: (events) => void told.push(...events),
      examine: () => {},
    });
    placer.want(target, etag);
    return { placer, told, target };
  }

  test("is not taken for what has its name a moment later", async () => {
    using folder = makeRoot({ "a.txt": "a" });
    const { told } = await retime(folder.path, openFolder(folder.path));
    while (statSync(`${folder.path}/a.txt`).mtimeMs > 1.1e12) await new Promise(setImmediate);
    writeFileSync(`${folder.path}/a.txt`, "something else");
    await waitFor("it is placed", () => told.length > 0);
    const { etag } = await openFolder(folder.path).stat("a.txt");
    expect(told[0]).toMatchObject({ kind: "placed" });
    expect(told[0]).not.toMatchObject({ etag });
  });

  test("is tried again where the system refuses it", async () => {
    using folder = makeRoot({ "a.txt": "a" });
    const root = openFolder(folder.path);
    let opened = 0;
    const failing: Pick<Folder, "open" | "look" | "readNow"> = {
      look: (path) => root.look(path),
      readNow: (path) => root.readNow(path),
      open: async (path) => {
        const file = await root.open(path);
        if (++opened > 1) return file;
        file.close();
        return { meta: file.meta, fd: 1_000_000, close: () => {} } as typeof file;
      },
    };
    const { placer, told } = await retime(folder.path, failing as Folder);
    await waitFor("it says what is wrong", () => placer.problem);
    await waitFor("it is placed", () => told.length > 0);
    expect(told[0]).toMatchObject({ kind: "placed", etag: root.look("a.txt")?.etag });
    expect(statSync(`${folder.path}/a.txt`).mtimeMs).toBeCloseTo(1e12, 0);
  });
});

test("what cannot be noted in the index is no problem of a file: the keeper ends, and another looks at everything", async () => {
  using folder = makeRoot({ "a.txt": randomBytes(MAX_CONTENT_BYTES + 1) });
  const placing = `
    const { Placer } = require(${JSON.stringify(join(HOME, "place.ts"))});
    const { openChanges } = require(${JSON.stringify(join(HOME, "changes.ts"))});
    const { openFolder } = require(${JSON.stringify(join(HOME, "storage.ts"))});
    const { hashOf } = require(${JSON.stringify(join(HOME, "watch.ts"))});
    const { Index } = require(${JSON.stringify(join(HOME, "index.ts"))});
    const [path] = process.argv.slice(1);
    const changes = openChanges(path);
    const index = new Index(path + "/.reprise/index.sqlite");
    hashOf(openFolder(path), "a.txt").then(({ version, etag }) => {
      const target = { ...version, path: "b.txt", revision: 1, origin: "b", over: "" };
      const entry = { base: 0, sent: undefined, passed: [] };
      index.set({ ...entry, path: "a.txt", known: version, seen: version, etag, target: undefined });
      const gone = { kind: "gone", size: 0, mtime: 0, sha256: "" };
      index.set({ ...entry, path: "b.txt", known: gone, seen: gone, etag: "", target });
      const state = { node: "a", entries: index, cursor: 2, online: true, snapshot: undefined };
      const take = () => index.transaction(() => {
        throw Object.assign(new Error("database or disk is full"), { name: "SQLiteError", code: "SQLITE_FULL" });
      });
      const none = () => {};
      const placer = new Placer({ root: openFolder(path), changes, index, state, take,
        holdersOf: () => [], connectTo: none, isEveryoneHere: () => false, examine: none });
      placer.want(target, "");
      setTimeout(() => process.exit(0), 2000);
    });`;
  await using child = Bun.spawn([process.execPath, "-e", placing, folder.path], {
    stdio: ["ignore", "ignore", "pipe"],
  });
  const said = await new Response(child.stderr).text();
  expect(said).toContain("SQLITE_FULL");
  expect(await child.exited).toBe(1);
});

describe("a root that is removed", () => {
  test("is said to be gone, once", async () => {
    using folder = makeRoot({ "a.txt": "a" });
    using other = makeRoot({});
    const index = new Index(`${other.path}/index.sqlite`);
    const root = openFolder(folder.path);
    const errors: unknown[] = [];
    const observer = new Observer(root, index, { take: async () => {}, onError: (error) => void errors.push(error) });
    rmSync(folder.path, { recursive: true });
    await observer.examine([""]);
    expect(errors).toMatchObject([{ code: "not_found" }]);
  });
});

describe("a member that was away for long", () => {
  test("is not told more of a snapshot at a time than it takes in", async () => {
    using root = makeRoot({});
    mkdirSync(`${root.path}/.reprise`, { recursive: true });
    const file = `${root.path}/.reprise/ledger.sqlite`;
    const ledger = new EmbeddedLedger(file);
    const names = Array.from({ length: 1200 }, (_, number) => `folder${number}`);
    ledger.append(
      "another",
      names.map((path) => ({ path, base: 0, version: FOLDER })),
    );
    ledger.close();
    // As if most of its records had been superseded since, and deletions forgotten.
    const db = new Database(file);
    db.run("UPDATE records SET revision = -revision * 100");
    db.run("UPDATE records SET revision = -revision");
    db.run("INSERT OR REPLACE INTO facts VALUES ('revision', 120000), ('pruned', 120000)");
    db.close();

    await using master = await startServer(root.path);
    await waitFor("the master has all", async () => (await statusOf(master.address)).revision === 120_000);
    using own = startFakeServer((request) => [
      request.action === "link" ? encodeLink({ kind: "called", node: "late" }) : undefined,
    ]);
    const heard = { stretches: 0, beats: 0 };
    const [host, port] = master.address.split(":");
    const up: Up = new Up({
      address: { host: host!, port: Number(port) },
      token: undefined,
      ca: undefined,
      join: () => joinOf("late", own.port),
      onJoined: () => up.read(119_000),
      onMessage: ({ kind }) => {
        if (kind === "stretch") heard.stretches++;
        if (kind === "alive") heard.beats++;
      },
      onLost: () => {},
    });
    void up.run();
    const answer = (received: number) =>
      up.say({ kind: "alive", received, known: 0, revision: 0, nodes: [], problem: undefined });
    await waitFor("it has begun", () => heard.stretches > 0);
    const { beats } = heard;
    await waitFor("the master has said something else twice", () => heard.beats > beats + 1);
    expect(heard.stretches).toBe(1);
    // What it had before the snapshot is no answer for more than was sent.
    answer(119_000);
    await waitFor("it goes on", () => heard.stretches > 1);
    answer(100_000);
    await waitFor("it has all", () => heard.stretches === 3);
    up.close();
  });
});

describe("a log", () => {
  const LEDGER = join(".reprise", "ledger.sqlite");

  test("that an older one was put in place of is begun anew: nothing is lost, nothing comes back", async () => {
    await using cluster = await startCluster({ replicas: 2, files: { a: "1" } });
    const { master, replicas } = cluster;
    await cluster.settled();
    using kept = makeRoot({});
    const copy = join(kept.path, "old");
    await master.server.stop("SIGTERM");
    copyFileSync(join(master.root, LEDGER), copy);
    await master.start();
    await cluster.live();
    writeFileSync(join(replicas[0]!.root, "b"), "2");
    rmSync(join(replicas[1]!.root, "a"));
    await cluster.settled();
    await master.server.stop("SIGTERM");
    for (const more of ["", "-wal", "-shm"]) rmSync(join(master.root, LEDGER + more), { force: true });
    copyFileSync(copy, join(master.root, LEDGER));
    await master.start();
    await waitFor("it is said", () => master.server.stderr().includes("knows a later log"));
    await cluster.live();
    writeFileSync(join(replicas[0]!.root, "c"), "3");
    await waitFor("all have it", () => cluster.nodes.every(({ root }) => existsSync(join(root, "c"))));
    const names = (await cluster.settled()).map((line) => line.split(" ")[0]);
    expect(names).toEqual(["b", "c"]);
  });

  test("that a server had as a master goes when it joins another", async () => {
    await using cluster = await startCluster({ replicas: 1, files: { a: "1" } });
    await using other = await startCluster({ replicas: 0, files: { b: "2" } });
    const { master, replicas } = cluster;
    await cluster.settled();
    expect(existsSync(join(master.root, LEDGER))).toBe(true);
    await master.server.stop("SIGTERM");
    await replicas[0]!.server.stop("SIGTERM");
    await using member = await startServer(master.root, { args: ["--writable", "--join", other.address] });
    await waitFor("it has joined", () => existsSync(join(master.root, "b")));
    await waitFor("it is said", () => member.stderr().includes("joined"));
    expect(existsSync(join(master.root, LEDGER))).toBe(false);
  });
});

test("two servers over one root: the second waits for the first to end", async () => {
  await using cluster = await startCluster({ replicas: 1 });
  const { root, server } = cluster.replicas[0]!;
  await using second = await startServer(root, { args: ["--writable", "--join", cluster.address] });
  await waitFor("it waits", () => second.stderr().includes("waiting for its end"));
  expect(second.stderr()).not.toContain("joined");
  await server.stop("SIGKILL");
  await waitFor("it has joined", () => second.stderr().includes("joined"));
});

test("a member whose keeper stands still is waited for no longer than its lease, and comes back", async () => {
  await using cluster = await startCluster({ replicas: 2 });
  const [first, second] = cluster.replicas;
  const keeper = childrenOf(second!.server.process.pid).find((pid) =>
    readFileSync(`/proc/${pid}/environ`, "utf8").includes("REPRISE_KEEPER="),
  )!;
  signal(keeper, "SIGSTOP");
  try {
    const put = await runClient(first!.server.address, ["put", "-", "-t", "a"], { stdin: "1" });
    expect([put.status, put.errors]).toEqual([0, ""]);
    await cluster.live(1);
  } finally {
    signal(keeper, "SIGCONT");
  }
  await cluster.live(2);
  expect((await cluster.settled()).length).toBe(1);
});
