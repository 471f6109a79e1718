/**
 * Joining: servers that become a cluster with nothing but `--join`, whom clients are sent to, who is refused and told why,
 * and what is left of it all at the end.
 */
import { Database } from "bun:sqlite";
import { afterAll, beforeAll, describe, expect, setDefaultTimeout, test } from "bun:test";
import { existsSync, mkdirSync, readdirSync, readFileSync, rmSync, writeFileSync } from "node:fs";
import { connect, createServer } from "node:net";
import { networkInterfaces } from "node:os";
import { join } from "node:path";
import type { MemberStatus } from "../hub.ts";
import { FOLDER } from "../ledger.ts";
import { LINK_VERSION } from "../link.ts";
import {
  type Answer,
  DIRECT,
  decodeAnswer,
  encodeError,
  encodeHello,
  encodeLink,
  encodeRedirect,
  encodeRequest,
  FrameDecoder,
  MAX_ANSWER_BYTES,
  RepriseError,
  UNKNOWN_SIZE,
} from "../protocol.ts";
import { openFolder } from "../storage.ts";
import { type Access, addToken } from "../tokens.ts";
import { authority, hasOpenssl, pair } from "./certificates.ts";
import { type Cluster, type Node, startCluster, statusOf } from "./clusters.ts";
import { startProxy } from "./faults/proxy.ts";
import {
  childrenOf,
  connectRaw,
  type FakeServer,
  freePort,
  HOME,
  ifStill,
  isAlive,
  killHard,
  makeRoot,
  type RawConnection,
  runClient,
  type Server,
  signal,
  spawnClient,
  startFakeServer,
  startServer,
  TEST_MS,
  temporaryFolder,
  waitFor,
} from "./fixtures.ts";

setDefaultTimeout(TEST_MS);

const HOST = "127.0.0.1";
const WRITABLE = ["--writable"];

// ---------------------------------------------------------------------------------------------------- what is seen

const processesOf = (server: Server) => [server.process.pid, ...childrenOf(server.process.pid)];
const isKeeper = (pid: number) =>
  ifStill(() => readFileSync(`/proc/${pid}/environ`, "utf8"))?.includes("REPRISE_KEEPER=") ?? false;
const keeperOf = (server: Server) => childrenOf(server.process.pid).find(isKeeper);
const count = (text: string, part: string) => text.split(part).length - 1;
const said = (server: Server, ...parts: string[]) =>
  waitFor(`${parts.join(" … ")} is said`, () => parts.every((part) => server.stderr().includes(part)));
const logged = (server: Server, event: string, status: string) =>
  server.log.filter((line) => line.event === event && line.status === status);

/** Lines come by way of a pipe, and so a little later. */
const areLogged = (server: Server, event: string, status: string, lines = 1) =>
  waitFor(`${lines} of ${event} ${status}`, () => logged(server, event, status).length >= lines);

function signalAll(pids: number[], name: NodeJS.Signals): void {
  for (const pid of pids) signal(pid, name);
}

/** How a server sees one that has joined it. */
async function memberOf(master: Server, { address }: { address: string }): Promise<MemberStatus | undefined> {
  const { replicas } = await statusOf(master.address);
  return replicas.find((replica) => replica.address === address);
}

const isLive = (master: Server, member: { address: string }) =>
  waitFor(`${member.address} is live`, async () => (await memberOf(master, member))?.state === "live");
const isGone = (master: Server, member: { address: string }) =>
  waitFor(`${member.address} is gone`, async () => (await memberOf(master, member))?.state === "gone");

/** Puts through one server, and reads from another without being sent on from there. */
async function put(server: string, name: string, content: string): Promise<void> {
  expect(await runClient(server, ["put", "-", "-t", name], { stdin: content })).toMatchObject({ status: 0 });
}
const cat = async (server: string, name: string) => (await runClient(server, ["cat", name])).output;
const has = (root: string, name: string, content: string) =>
  waitFor(
    `${root} has ${name}`,
    () => existsSync(join(root, name)) && readFileSync(join(root, name), "utf8") === content,
  );

/** What comes to one port goes to another; unlike that of a proxy, the port is chosen. */
function forward(from: number, to: number): Disposable {
  const listener = createServer((socket) => {
    const other = connect(to, HOST);
    socket.pipe(other).pipe(socket);
    for (const end of [socket, other]) end.on("error", () => {});
  });
  listener.listen(from, HOST);
  return { [Symbol.dispose]: () => void listener.close() };
}

// ---------------------------------------------------------------------------------------------------- by hand

interface Hand extends Disposable {
  raw: RawConnection;
  send(...frames: Uint8Array[]): void;
  say(message: object): void;
  /** Everything that came so far. */
  answers(): Answer[];
  /** The first that is like that. */
  answer<T extends Answer["type"]>(
    type: T,
    isRight?: (answer: Extract<Answer, { type: T }>) => boolean,
  ): Promise<Extract<Answer, { type: T }>>;
  /** The first LINK of a kind. */
  heard(kind: string, isRight?: (message: Heard) => boolean): Promise<Heard>;
}
type Heard = Record<string, unknown>;

/** A peer that says whatever the test wants. */
async function greet(port: number, hello: Parameters<typeof encodeHello>[0] = { flags: DIRECT }): Promise<Hand> {
  return handOf(await connectRaw(port), hello);
}

/** From another address of this machine. */
async function greetAt(host: string, port: number): Promise<Hand> {
  return handOf(await connectRaw(port, host), { flags: DIRECT });
}

function handOf(raw: RawConnection, hello: Parameters<typeof encodeHello>[0]): Hand {
  const send = (...frames: Uint8Array[]) => void raw.socket.write(Buffer.concat(frames));
  send(encodeHello(hello));
  const answers = () => {
    const decoder = new FrameDecoder({ maxLength: MAX_ANSWER_BYTES });
    decoder.push(new Uint8Array(raw.received()));
    const found: Answer[] = [];
    for (let frame = decoder.next(); frame; frame = decoder.next()) found.push(decodeAnswer(frame));
    return found;
  };
  const answer: Hand["answer"] = (type, isRight = () => true) =>
    waitFor(`${type} comes`, () =>
      answers().find((answer) => answer.type === type && isRight(answer as never)),
    ) as never;
  return {
    raw,
    send,
    answers,
    answer,
    say: (message) => send(encodeLink(message)),
    heard: async (kind, isRight = () => true) =>
      (await answer("link", ({ message }) => message.kind === kind && isRight(message))).message,
    [Symbol.dispose]: () => raw[Symbol.dispose](),
  };
}

/** Where the next client is sent; "here" for nowhere else. */
async function sentTo(port: number): Promise<string> {
  const { promise, resolve, reject } = Promise.withResolvers<Answer>();
  const decoder = new FrameDecoder({ maxLength: MAX_ANSWER_BYTES });
  const socket = connect(port, HOST, () => socket.write(encodeHello()));
  socket.on("error", reject).on("data", (bytes) => {
    decoder.push(new Uint8Array(bytes as Buffer));
    const frame = decoder.next();
    if (frame) resolve(decodeAnswer(frame));
  });
  try {
    const first = await promise;
    if (first.type === "redirect") return `${first.host}:${first.port}`;
    return first.type === "welcome" ? "here" : first.type;
  } finally {
    socket.destroy();
  }
}

/** What a server of a test's own is: it says that it is the node that is asked for. */
function startNode(node: string): FakeServer {
  return startFakeServer((request) =>
    request.action === "link" && request.message.kind === "call" ? [encodeLink({ kind: "called", node })] : [undefined],
  );
}

const joinOf = (node: string, port: number) => ({
  kind: "join",
  version: LINK_VERSION,
  store: "folder",
  node,
  host: HOST,
  port,
  secret: "s",
});

/** A member of a test's own, that has joined. */
async function startMember(master: Server, node = "fake"): Promise<Hand> {
  const there = startNode(node);
  const hand = await greet(master.port);
  hand.say(joinOf(node, there.port));
  await hand.heard("joined");
  const end = () => {
    hand[Symbol.dispose]();
    there[Symbol.dispose]();
  };
  return { ...hand, [Symbol.dispose]: end };
}

const fileOf = (content: string, mtime = 1e15) => ({
  kind: "file",
  size: content.length,
  mtime,
  sha256: Bun.SHA256.hash(content, "hex"),
});

// ---------------------------------------------------------------------------------------------------- membership

describe("membership", () => {
  test("--join is all it takes; status says who is there, how far, and how", async () => {
    await using cluster = await startCluster({ files: { a: "one" } });
    const [master, b, c] = cluster.nodes as [Node, Node, Node];
    await cluster.settled();
    const { role, revision, replicas } = await master.status();
    expect({ role, revision }).toEqual({ role: "master", revision: 1 });
    const addresses = replicas.map(({ address }) => address);
    expect(addresses.toSorted()).toEqual([b.server.address, c.server.address].toSorted());
    const rows = addresses.map((address) => ({ address, state: "live", revision: 1, lag: 0 }));
    expect(replicas).toMatchObject(rows);
    expect(await b.status()).toMatchObject({ role: "replica", master: cluster.address, revision: 1, replicas: [] });
    const json = await runClient(cluster.address, ["status", "--json"]);
    expect(JSON.parse(json.output)).toMatchObject({ role: "master", replicas: rows });
    // Nobody outside learns by what the members know each other.
    expect(json.output).not.toContain("secret");
    const { output } = await runClient(cluster.address, ["status"]);
    for (const { server } of [b, c]) expect(output).toMatch(new RegExp(`${server.address}\\s+live\\s+1\\s+0`));
    const text = (await runClient(b.server.address, ["status"])).output;
    expect(text).toMatch(new RegExp(`master\\s+${cluster.address}`));
    await said(b.server, `joined ${cluster.address}`);
  });

  test("one that is silent is left out when its lease ends, one that dies at once, and both come back", async () => {
    await using cluster = await startCluster();
    const [master, b, c] = cluster.nodes as [Node, Node, Node];
    const stopped = processesOf(b.server);
    signalAll(stopped, "SIGSTOP");
    try {
      await isGone(master.server, b.server);
      await areLogged(master.server, "member", "idle");
      expect(logged(master.server, "member", "idle").map(({ peer }) => peer)).toEqual([b.server.address]);
      expect([await sentTo(master.server.port), await sentTo(master.server.port)]).toEqual([
        c.server.address,
        c.server.address,
      ]);
    } finally {
      signalAll(stopped, "SIGCONT");
    }
    await cluster.live(2);
    await c.kill();
    await isGone(master.server, c.server);
    // Its lease had no need to end.
    expect(logged(master.server, "member", "idle").length).toBe(1);
    expect(await sentTo(master.server.port)).toBe(b.server.address);
    await c.start();
    await cluster.live(2);
  });

  test("a master that comes back on its port has its members again, and its ledger", async () => {
    await using cluster = await startCluster({ files: { a: "one" } });
    const [master, b] = cluster.nodes as [Node, Node];
    await cluster.settled();
    for (const end of [master.kill, () => master.server.stop("SIGINT"), () => master.server.stop("SIGTERM")]) {
      await end();
      await said(b.server, `no connection to the master ${cluster.address}`);
      expect(b.server.stderr()).not.toContain(`${cluster.address}: ${cluster.address}`);
      expect(await cat(b.server.address, "a")).toBe("one");
      await master.start();
      await cluster.live(2);
      expect((await master.status()).revision).toBe(1);
    }
  });

  test("--advertise is what clients are told", async () => {
    await using cluster = await startCluster({ replicas: 0, files: { a: "one" } });
    const port = freePort();
    using root = makeRoot({});
    const args = ["--join", cluster.address, "--advertise", `localhost:${port}`];
    await using _ = await startServer(root.path, { args, port });
    await cluster.live(1);
    expect(await sentTo(cluster.master.server.port)).toBe(`localhost:${port}`);
    expect(await cat(cluster.address, "a")).toBe("one");
  });

  test("clients are sent to a member only once it has what was there when it came", async () => {
    const files = Object.fromEntries(Array.from({ length: 1000 }, (_, index) => [`f${index}`, `content ${index}`]));
    await using cluster = await startCluster({ replicas: 0, files });
    const { server } = cluster.master;
    const node = await cluster.add();
    await waitFor("clients are sent there", async () => (await sentTo(server.port)) === node.server.address);
    expect(readdirSync(node.root).length).toBe(1001);
    expect(await memberOf(server, node.server)).toMatchObject({ state: "live", revision: 1000, lag: 0 });
  });
});

// ---------------------------------------------------------------------------------------------------- acknowledged

describe("what is acknowledged is known to whom clients are sent", () => {
  /** A member of a test's own that takes in what it is told to, and says again and again how far it is. */
  async function startTold(master: Server) {
    const hand = await startMember(master);
    let known = 0;
    const say = () => hand.say({ kind: "alive", received: known, known, revision: known, nodes: [] });
    const beats = setInterval(say, 500);
    hand.say({ kind: "read", after: 0 });
    const state = async () => (await statusOf(master.address)).replicas.find(({ node }) => node === "fake")!;
    return {
      has: (revision: number) =>
        hand.heard("stretch", ({ stretch }) => (stretch as { revision: number }).revision >= revision),
      /** Says so, and returns what it is then. */
      know: async (revision: number) => {
        known = revision;
        say();
        await waitFor("that is heard", async () => (await state()).revision === revision);
        return (await state()).state;
      },
      /** Of one more record, which is acknowledged. */
      propose: async (path: string) => {
        const id = Math.floor(Math.random() * 2 ** 40);
        hand.say({ kind: "propose", id, origin: "fake", proposals: [{ path, base: 0, version: FOLDER }] });
        const { decisions } = await hand.heard("decided", (message) => message.id === id);
        return (decisions as [{ revision: number }])[0].revision;
      },
      [Symbol.dispose]: () => {
        clearInterval(beats);
        hand[Symbol.dispose]();
      },
    };
  }

  test.each([
    ["a master", 0],
    ["a member", 1],
  ])("also without one that was joining %s", async (_, index) => {
    await using cluster = await startCluster({ replicas: 1, files: { a: "one" } });
    await cluster.settled();
    const { server } = cluster.nodes[index]!;
    using member = await startTold(server);
    await member.has(1);
    await put(server.address, "b", "two");
    expect(await member.know(1)).toBe("joining");
    // From here on it is waited for.
    using hand = await greet(server.port);
    hand.send(encodeRequest({ action: "mkdir", path: "c", parents: false }));
    await member.has(3);
    expect(await member.know(2)).toBe("live");
    expect(hand.answers().map(({ type }) => type)).not.toContain("end");
    expect(await member.know(3)).toBe("live");
    await hand.answer("end");
  });

  test("also without one that was left out", async () => {
    using root = makeRoot({ a: "one" });
    await using master = await startServer(root.path, { args: WRITABLE });
    using member = await startTold(master);
    await waitFor("it is live", async () => (await member.know(1)) === "live");
    // It takes this in no more, and so it is waited for until it is left out; and not with the next.
    expect(await member.propose("b")).toBe(2);
    await areLogged(master, "member", "behind");
    expect(await member.propose("c")).toBe(3);
    expect(await member.know(2)).toBe("joining");
    expect(await sentTo(master.port)).toBe("here");
    expect(await member.know(3)).toBe("live");
    expect(await sentTo(master.port)).not.toBe("here");
  });

  test("also where the keeper that waited for it was killed", async () => {
    using root = makeRoot({ a: "one" });
    await using master = await startServer(root.path, { args: WRITABLE });
    using member = await startTold(master);
    await waitFor("it is live", async () => (await member.know(1)) === "live");
    using hand = await greet(master.port);
    hand.send(encodeRequest({ action: "mkdir", path: "b", parents: false }));
    await member.has(2);
    expect(hand.answers().map(({ type }) => type)).not.toContain("end");
    signal(keeperOf(master)!, "SIGKILL");
    // The next one answers, and knows of nobody yet.
    await hand.answer("end");
    expect(await sentTo(master.port)).toBe("here");
  });
});

// ---------------------------------------------------------------------------------------------------- rotation

describe("rotation", () => {
  /** What each of 300 connections, one after the other, is told. */
  async function ask(server: Server, times = 300): Promise<string[]> {
    const told: string[] = [];
    while (told.length < times) told.push(await sentTo(server.port));
    return told;
  }
  /** Each of them in turn, whoever was the first. */
  function expectTurns(told: string[], members: string[]): void {
    const turns = told.slice(0, members.length);
    expect(turns.toSorted()).toEqual(members.toSorted());
    expect(told).toEqual(told.map((_, index) => turns[index % turns.length]!));
  }

  test("over two workers: two, three, two, one, none", async () => {
    await using cluster = await startCluster({ files: { a: "one" } });
    const { server } = cluster.master;
    const addresses = () => cluster.replicas.map(({ server: { address } }) => address);
    const told = await ask(server);
    expectTurns(told, addresses());
    await areLogged(server, "redirect", "ok", told.length);
    const lines = logged(server, "redirect", "ok");
    expect(lines.map(({ to }) => to).toSorted()).toEqual(told.toSorted());
    expect(new Set(lines.map(({ worker }) => worker))).toEqual(new Set([1, 2]));
    await cluster.add();
    await cluster.live(3);
    expectTurns(await ask(server), addresses());
    const [first, ...others] = cluster.replicas as [Node, Node, Node];
    await first.kill();
    await cluster.live(2);
    expectTurns(await ask(server, 20), addresses().slice(1));
    for (const node of others) await node.kill();
    await cluster.live(0);
    expect(await ask(server, 10)).toEqual(Array(10).fill("here"));
    expect(await cat(cluster.address, "a")).toBe("one");
    await areLogged(server, "get", "ok");
  });

  test("members have members: a client goes all the way down, and what it changes all the way up", async () => {
    await using cluster = await startCluster({ replicas: 1, files: { a: "one" } });
    const [a, b] = cluster.nodes as [Node, Node];
    const d = await cluster.add({ deep: "below" }, b);
    await isLive(b.server, d.server);
    await cluster.settled();
    expect(await cat(a.server.address, "a")).toBe("one");
    await Promise.all([a, b].map(({ server }) => areLogged(server, "redirect", "ok")));
    expect(logged(a.server, "redirect", "ok").map(({ to }) => to)).toEqual([b.server.address]);
    expect(logged(b.server, "redirect", "ok").map(({ to }) => to)).toEqual([d.server.address]);
    await waitFor("it is read there", () => logged(d.server, "get", "ok").some(({ path }) => path === "a"));
    await put(a.server.address, "b", "two");
    await waitFor("it is put there", () => logged(d.server, "put", "ok").some(({ path }) => path === "b"));
    await cluster.settled();
    expect(
      cluster.nodes.map(({ root }) =>
        readdirSync(root)
          .filter((name) => name !== ".reprise")
          .sort(),
      ),
    ).toEqual(Array(3).fill(["a", "b", "deep"]));
    expect((await d.status()).role).toBe("replica");
  });
});

// ---------------------------------------------------------------------------------------------------- tokens

describe("who may join", () => {
  let folder: ReturnType<typeof temporaryFolder>;
  beforeAll(() => {
    folder = temporaryFolder();
  });
  afterAll(() => folder[Symbol.dispose]());

  /** A file of tokens, and their texts by name. */
  function tokensOf(name: string, wanted: Record<string, { access: Access; folder?: string; expires?: string }>) {
    const file = join(folder.path, name);
    const texts: Record<string, string> = {};
    for (const [name, { access, folder = "", expires }] of Object.entries(wanted))
      texts[name] = addToken(file, { name, access, folder, expires });
    return { file, texts, args: ["--tokens", file] };
  }

  test("needs a replica token of the whole root; whoever gets one later joins by himself", async () => {
    const tokens = tokensOf("kinds.json", {
      reader: { access: "read" },
      writer: { access: "write" },
      old: { access: "replica", expires: "2020-01-01T00:00:00.000Z" },
      bound: { access: "replica", folder: "sub" },
      right: { access: "replica" },
    });
    using root = makeRoot({ a: "one", "sub/b": "two" });
    await using master = await startServer(root.path, { args: tokens.args });
    const { right, ...wrong } = tokens.texts;
    const members: { name: string; root: ReturnType<typeof makeRoot>; server: Server }[] = [];
    try {
      for (const [name, text] of Object.entries({ ...wrong, none: "" })) {
        const root = makeRoot({});
        const server = await startServer(root.path, { args: ["--join", master.address], env: { REPRISE_TOKEN: text } });
        members.push({ name, root, server });
      }
      for (const { server, root } of members) {
        await said(server, `cannot join ${master.address}`, "access denied", "trying again");
        expect(existsSync(join(root.path, "a"))).toBe(false);
        await waitFor("it is logged", () => logged(server, "join", "denied").length === 1);
        // It serves all the same.
        expect((await runClient(server.address, ["ls"])).status).toBe(0);
      }
      const names = () =>
        new Set(
          logged(master, "link", "denied")
            .concat(logged(master, "close", "denied"))
            .map(({ token }) => token),
        );
      await waitFor("all are logged", () => names().size === 5 || names().size === 6);
      expect(names()).toEqual(new Set(["reader", "writer", "old", "bound", undefined]));
      expect(childrenOf(master.process.pid).some(isKeeper)).toBe(false);
      // The reason goes.
      const entries = JSON.parse(readFileSync(tokens.file, "utf8"));
      for (const entry of entries.tokens) if (entry.name === "reader") entry.access = "replica";
      writeFileSync(tokens.file, JSON.stringify(entries));
      master.process.kill("SIGHUP");
      const [reader] = members as [(typeof members)[0]];
      await said(reader.server, `joined ${master.address}`);
      await has(reader.root.path, "sub/b", "two");
      for (const { server } of [...members, { server: master }])
        for (const text of Object.values(tokens.texts)) expect(server.stderr()).not.toContain(text);
      expect(right).toBeDefined();
    } finally {
      await Promise.all(members.map(({ server }) => server[Symbol.asyncDispose]()));
      for (const { root } of members) root[Symbol.dispose]();
    }
  });

  test("a token that is taken away ends its link, and what comes over it", async () => {
    const tokens = tokensOf("taken.json", { member: { access: "replica" } });
    using root = makeRoot({ a: "one" });
    using other = makeRoot({});
    await using master = await startServer(root.path, { args: tokens.args });
    const args = ["--join", master.address];
    await using member = await startServer(other.path, { args, env: { REPRISE_TOKEN: tokens.texts.member! } });
    await has(other.path, "a", "one");
    writeFileSync(tokens.file, JSON.stringify({ tokens: [] }));
    master.process.kill("SIGHUP");
    await said(member, `cannot join ${master.address}`, "access denied");
    writeFileSync(join(root.path, "b"), "two");
    writeFileSync(join(other.path, "c"), "three");
    await Bun.sleep(0);
    expect(existsSync(join(other.path, "b")) || existsSync(join(root.path, "c"))).toBe(false);
  });

  test.skipIf(!hasOpenssl)(
    "with TLS and tokens everywhere: put through one, get from another; no secret is logged",
    async () => {
      const tokens = tokensOf("all.json", { ann: { access: "write" }, member: { access: "replica" } });
      const { args } = pair("good");
      const secure = [...WRITABLE, ...tokens.args, ...args, "--ca", authority()];
      const env = { REPRISE_TOKEN: tokens.texts.member! };
      using roots = temporaryFolder();
      const rootOf = (name: string) => {
        using made = makeRoot({}, roots.path);
        const path = join(roots.path, name);
        Bun.spawnSync(["mv", made.path, path]);
        return path;
      };
      const [one, two, three] = [rootOf("A"), rootOf("B"), rootOf("C")];
      await using a = await startServer(one!, { args: secure });
      expect(a.address).toStartWith("tls://");
      const joining = [...secure, "--join", a.address];
      await using b = await startServer(two!, { args: joining, env });
      await using c = await startServer(three!, { args: joining, env });
      for (const server of [b, c])
        await waitFor("it is live", () =>
          logged(a, "member", "live").some(({ peer }) => server.address.endsWith(peer!)),
        );
      const ann = { REPRISE_TOKEN: tokens.texts.ann!, REPRISE_CA: authority() };
      const run = (server: Server, args: string[], stdin?: string) =>
        runClient(server.address, args, { env: ann, ...(stdin && { stdin }) });
      expect(await run(b, ["put", "-", "-t", "x"], "through b")).toMatchObject({ status: 0 });
      expect((await run(c, ["cat", "x"])).output).toBe("through b");
      expect((await run(a, ["cat", "x"])).output).toBe("through b");
      await has(one!, "x", "through b");
      // The members' secret is as good as a token among them; it is nobody's to see.
      using index = new Database(join(one!, ".reprise/index.sqlite"));
      const { value } = index.query("SELECT value FROM facts WHERE name = 'secret'").get() as { value: string };
      expect(value.length).toBeGreaterThan(40);
      for (const { stderr } of [a, b, c])
        for (const text of [value, ...Object.values(tokens.texts)]) expect(stderr()).not.toContain(text);
      const asMember = await runClient(c.address, ["cat", "x"], {
        env: { REPRISE_CA: authority(), REPRISE_TOKEN: value },
      });
      expect(asMember.output).toBe("through b");
    },
  );

  const outside = Object.values(networkInterfaces())
    .flatMap((addresses) => addresses ?? [])
    .find(({ internal, family }) => !internal && family === "IPv4")?.address;
  if (!outside) console.log("skipped: this machine has no address besides loopback to join from");

  test.skipIf(!outside)("without tokens only from this machine; a token or a secret never in clear", async () => {
    using root = makeRoot({ a: "one" });
    using other = makeRoot({});
    await using master = await startServer(root.path, { args: ["--host", "0.0.0.0"] });
    const address = `${outside}:${master.port}`;
    await using member = await startServer(other.path, { args: ["--join", address] });
    await said(member, `cannot join ${address}`, "TLS");
    using hand = await greetAt(outside!, master.port);
    hand.say(joinOf("stranger", 1));
    const { error } = await hand.answer("error");
    expect(error).toMatchObject({ code: "refused", message: expect.stringContaining("--tokens") });
    await waitFor("it is logged", () => logged(master, "link", "refused").some(({ peer }) => peer === outside));
    expect(keeperOf(master)).toBeUndefined();
    expect(existsSync(join(other.path, "a"))).toBe(false);
  });

  test("a member goes where it was sent to by its command line, and by nobody else", async () => {
    using stranger = startFakeServer(() => [undefined]);
    using forger = startFakeServer(() => [encodeRedirect(HOST, stranger.port)], {
      greet: (_, connection) =>
        connection === 1 ? [encodeRedirect(HOST, stranger.port)] : [encodeLink({ kind: "joined" })],
    });
    using root = makeRoot({});
    await using member = await startServer(root.path, { args: ["--join", forger.address] });
    await waitFor("it has tried again", () => forger.hellos.length > 2);
    await said(member, "not the reprise protocol");
    expect(stranger.hellos).toEqual([]);
  });
});

// ---------------------------------------------------------------------------------------------------- what others send

describe("LINK frames", () => {
  let master: Server;
  let root: ReturnType<typeof makeRoot>;
  /** No process logs more than thirty refusals of a kind in a minute. */
  let other: Server;
  let otherRoot: ReturnType<typeof makeRoot>;
  beforeAll(async () => {
    root = makeRoot({ a: "one" });
    master = await startServer(root.path, { args: WRITABLE });
    otherRoot = makeRoot({ a: "one" });
    other = await startServer(otherRoot.path, { args: WRITABLE });
  });
  afterAll(async () => {
    for (const server of [master, other]) await server[Symbol.asyncDispose]();
    for (const folder of [root, otherRoot]) folder[Symbol.dispose]();
  });
  const frame = (payload: string) => {
    const bytes = encodeLink({ a: payload });
    // The same frame around another payload.
    const raw = Buffer.from(payload);
    const out = Buffer.alloc(9 + raw.length);
    out.writeUInt32BE(raw.length, 0);
    out[4] = bytes[4]!;
    const head = Buffer.concat([out.subarray(0, 5), raw]);
    out.writeUInt32BE(Bun.hash.crc32(head), 5);
    raw.copy(out, 9);
    return out;
  };
  const bad = async (hand: Hand, code = "bad_frame") =>
    expect((await hand.answer("error")).error.code).toBe(code as never);

  test("the helper makes frames that are right", () => {
    expect(frame('{"kind":"x"}').equals(encodeLink({ kind: "x" }))).toBe(true);
  });

  const first: [string, string][] = [
    ["no JSON", "nonsense"],
    ["a list", "[]"],
    ["nothing", ""],
    ["nothing known", '{"kind":"hello"}'],
    ["no kind", "{}"],
    ["a deep nest", `{"a":${"[".repeat(30_000)}${"]".repeat(30_000)}}`],
    ["64 KiB of it", `{"kind":"${"j".repeat(65_000)}"}`],
    ["a join of nothing", '{"kind":"join"}'],
    ["a proposal of who has not joined", '{"kind":"propose","id":1,"origin":"x","proposals":[]}'],
    ["a read of who has not joined", '{"kind":"read","after":0}'],
    ["a node with a name that is none", JSON.stringify(joinOf("../x", 1))],
    ["a secret that is none", JSON.stringify({ ...joinOf("n", 1), secret: "\u0000 é" })],
  ];
  test.each(first)("the first is refused where it is %s", async (_, payload) => {
    using hand = await greet(master.port);
    hand.send(frame(payload));
    await bad(hand);
    await waitFor("it is closed", () => hand.raw.closed());
  });

  test.each([
    ["of another version", { version: LINK_VERSION + 1 }, "version"],
    ["of no port", { port: 0 }, "refused"],
    ["of no port that there is", { port: 70_000 }, "refused"],
    ["of several hosts", { host: "127.0.0.1:1,localhost" }, "bad_frame"],
    ["of a host with a line's end", { host: "a\nb" }, "bad_frame"],
    ["of a host with NUL", { host: "a\u0000b" }, "bad_frame"],
    ["of a host too long for any", { host: "h".repeat(900) }, "bad_frame"],
    ["of a host that there is not", { host: "nowhere.invalid" }, "refused"],
  ])("a join %s is refused", async (_, part, code) => {
    using hand = await greet(master.port);
    hand.say({ ...joinOf("n", 1), ...part });
    await bad(hand, code);
    expect((await statusOf(master.address)).replicas.map(({ address }) => address)).not.toContain(
      expect.stringContaining("h"),
    );
  });

  const version = fileOf("x");
  const proposal = { path: "x", base: 0, version };
  const propose = (part: object, more: object = {}) => ({
    kind: "propose",
    id: 1,
    origin: "fake",
    proposals: [{ ...proposal, ...part }],
    ...more,
  });
  test.each<[string, object]>([
    ["for another", propose({}, { origin: "other" })],
    ["of a path upwards", propose({ path: "../x" })],
    ["of a path that goes up within", propose({ path: "a/../b" })],
    ["of an absolute path", propose({ path: "/etc/x" })],
    ["of the server's own folder", propose({ path: ".reprise/ledger.sqlite" })],
    ["of a part", propose({ path: "x.part" })],
    ["of a name with NUL", propose({ path: "a\u0000b" })],
    ["of a path of 5 kB", propose({ path: `${"p".repeat(99)}/`.repeat(50) })],
    ["of the root", propose({ path: "" })],
    ["of no path", propose({ path: undefined })],
    ["of no version", propose({ version: undefined })],
    ["of a version that is null", propose({ version: null })],
    ["of another kind", propose({ version: { ...version, kind: "link" } })],
    ["of a size below nothing", propose({ version: { ...version, size: -1 } })],
    ["of a digest that is none", propose({ version: { ...version, sha256: "../../x" } })],
    ["of a list that is none", propose({}, { proposals: {} })],
    ["of a list of nothing", propose({}, { proposals: [null] })],
    ["of a list of texts", propose({}, { proposals: ["x"] })],
    ["of a negative base", propose({ base: -1 })],
    ["and no request but LINK", { isRequest: true }],
    ["nor another join", joinOf("fake", 1)],
    ["nor an answer of a master", { kind: "joined", node: "x", ledger: "y", secret: "z" }],
    ["nor a read from nowhere", { kind: "read", after: -1 }],
    ["nor who is below it as a number", { kind: "alive", received: 0, known: 0, revision: 0, nodes: [1] }],
  ])("a member's proposal is refused %s", async (_, message) => {
    const keeper = keeperOf(other);
    const refused = [...logged(other, "link", "bad_frame"), ...logged(other, "close", "bad_frame")].length;
    using hand = await startMember(other);
    if ("isRequest" in message) hand.send(encodeRequest({ action: "stat", path: "a" }));
    else hand.say(message);
    await bad(hand);
    await waitFor("it is closed", () => hand.raw.closed());
    await waitFor(
      "it is logged",
      () => [...logged(other, "link", "bad_frame"), ...logged(other, "close", "bad_frame")].length > refused,
    );
    expect(readdirSync(otherRoot.path).sort()).toEqual([".reprise", "a"]);
    // Whoever keeps the tree has not died of it.
    if (keeper !== undefined) expect(keeperOf(other)).toBe(keeper);
    expect(other.log.filter(({ event }) => event === "bug")).toEqual([]);
  });

  test("in the middle of an upload it is none", async () => {
    using hand = await greet(master.port);
    const put = {
      action: "put",
      path: "up",
      id: "",
      offset: 0,
      size: UNKNOWN_SIZE,
      mtime: 0,
      noClobber: false,
      etag: "",
      parents: false,
    } as const;
    hand.send(encodeRequest(put), encodeLink(joinOf("n", 1)));
    await bad(hand);
    expect(await cat(master.address, "a")).toBe("one");
    expect(existsSync(join(root.path, "up"))).toBe(false);
  });

  test("an old record that is said again does nothing", async () => {
    using hand = await startMember(master);
    const decide = async (id: number, base: number, content: string) => {
      hand.say({ kind: "propose", id, origin: "fake", proposals: [{ path: "old", base, version: fileOf(content) }] });
      const [decision] = (await hand.heard("decided", (message) => message.id === id)).decisions as [object];
      return decision;
    };
    const { revision: first } = (await decide(1, 0, "first")) as { revision: number };
    expect(await decide(2, 0, "first")).toEqual({ revision: first });
    const { revision: second } = (await decide(3, first, "second")) as { revision: number };
    expect(second).toBeGreaterThan(first);
    for (const base of [0, first]) expect(await decide(4 + base, base, "first")).toEqual({ refusedFor: second });
  });
});

// ---------------------------------------------------------------------------------------------------- what goes wrong

describe("a join that cannot be", () => {
  let folder: ReturnType<typeof temporaryFolder>;
  beforeAll(() => {
    folder = temporaryFolder();
  });
  afterAll(() => folder[Symbol.dispose]());

  const start = (port: number, to: number | string, more: string[] = []) => {
    const root = join(folder.path, String(port));
    mkdirSync(root, { recursive: true });
    writeFileSync(join(root, `of-${port}`), String(port));
    return startServer(root, { port, args: ["--join", typeof to === "number" ? `${HOST}:${to}` : to, ...more] });
  };
  const plain = (port: number) => {
    const root = join(folder.path, String(port));
    mkdirSync(root, { recursive: true });
    return startServer(root, { port });
  };
  /** It serves, and does not say it again and again. */
  async function goesOn(server: Server, attempts: () => number): Promise<void> {
    const before = attempts();
    await waitFor("it has tried again", () => attempts() > before + 2);
    expect((await runClient(server.address, ["ls"])).status).toBe(0);
    expect(count(server.stderr(), "trying again")).toBeLessThanOrEqual(2);
  }
  const linesOf = (server: Server) =>
    server
      .stderr()
      .split("\n")
      .filter((line) => /join|link|member|cluster/.test(line)).length;

  test("of itself", async () => {
    const port = freePort();
    using proxy = startProxy({ target: port });
    await using server = await start(port, proxy.port);
    await said(server, "that is this server itself", "trying again");
    await goesOn(server, () => proxy.connections);
    expect(linesOf(server)).toBeLessThanOrEqual(6);
  });

  test.each([[2], [3]])(
    "in a circle of %d, all started at once: each is told, and one that leaves it resolves it",
    async (size) => {
      const ports = Array.from({ length: size }, freePort);
      const servers = await Promise.all(ports.map((port, index) => start(port, ports[(index + 1) % size]!)));
      try {
        await Promise.all(servers.map((server) => said(server, "a circle of servers", "trying again")));
        for (const server of servers) expect((await runClient(server.address, ["ls"])).status).toBe(0);
        const [first, ...others] = servers as [Server, ...Server[]];
        await first.stop("SIGINT");
        servers[0] = await plain(ports[0]!);
        await Promise.all(others.map((server) => said(server, `joined ${HOST}`)));
        for (const port of ports) await has(join(folder.path, String(ports[0])), `of-${port}`, String(port));
        for (const server of others) expect(linesOf(server)).toBeLessThan(16);
      } finally {
        await Promise.all(servers.map((server) => server[Symbol.asyncDispose]()));
      }
    },
  );

  test("in a circle that a master closes when it starts again as a member of its member", async () => {
    const [one, two] = [freePort(), freePort()];
    await using master = await plain(one);
    await using member = await start(two, one);
    await said(member, `joined ${HOST}:${one}`);
    await master.stop("SIGINT");
    await using again = await start(one, two);
    await Promise.all([again, member].map((server) => said(server, "a circle of servers")));
    expect(await sentTo(one)).toBe("here");
    expect(await sentTo(two)).toBe("here");
  });

  test("of a copy of the master, or of a member, until it has no .reprise any more", async () => {
    await using cluster = await startCluster({ replicas: 1, files: { a: "one" } });
    await cluster.settled();
    const { master, replicas } = cluster;
    const [member] = replicas as [Node];
    for (const [original, reason] of [
      [master, "that is this server itself"],
      [member, `${member.server.address} has the same name`],
    ] as const) {
      const port = freePort();
      const root = join(folder.path, String(port));
      Bun.spawnSync(["cp", "-r", original.root, root]);
      await using copy = await start(port, master.server.port);
      await said(copy, `cannot join ${cluster.address}`, reason, ".reprise");
      expect((await memberOf(master.server, member.server))!.state).toBe("live");
      await copy.stop("SIGINT");
      rmSync(join(root, ".reprise"), { recursive: true });
      await using again = await start(port, master.server.port);
      await isLive(master.server, again);
    }
    expect(logged(master.server, "member", "gone").map(({ peer }) => peer)).not.toContain(member.server.address);
  });

  test("of a server that has not joined its own master yet: when that comes, so do both", async () => {
    const [one, two, three] = [freePort(), freePort(), freePort()];
    await using last = await start(three, two);
    await said(last, "nothing listens there");
    await using middle = await start(two, one);
    await said(middle, "nothing listens there");
    await said(last, `has not joined ${HOST}:${one} itself yet`);
    await using first = await plain(one);
    await Promise.all([middle, last].map((server) => said(server, `joined ${HOST}`)));
    await has(join(folder.path, String(one)), `of-${three}`, String(three));
    expect(first.stderr()).not.toContain("may not join");
  });

  test("by an address where nobody is, where nobody can be, or where somebody else is", async () => {
    using root = makeRoot({});
    await using other = await startServer(root.path);
    await using master = await plain(freePort());
    const reasons = [
      [`${HOST}:${freePort()}`, "nothing listens there"],
      ["nowhere.invalid:2121", "no such host"],
      [other.address, "another server"],
    ] as const;
    const tryOne = async ([address, reason]: (typeof reasons)[number]) => {
      using proxy = startProxy({ target: master.port });
      await using member = await start(freePort(), proxy.port, ["--advertise", address]);
      const text = `cannot be called back at ${address}`;
      await said(member, `cannot join ${HOST}:${proxy.port}`, text, reason, "--advertise");
      await said(master, `${HOST} may not join`, text);
      await goesOn(member, () => proxy.connections);
      expect(count(master.stderr(), text)).toBe(1);
    };
    await Promise.all(reasons.map(tryOne));
    expect(await sentTo(master.port)).toBe("here");
  });

  test("of a member whose address is answered later: it joins then", async () => {
    const port = freePort();
    await using master = await plain(freePort());
    await using member = await start(freePort(), master.port, ["--advertise", `${HOST}:${port}`]);
    await said(master, "may not join");
    using _ = forward(port, member.port);
    await said(member, `joined ${master.address}`);
    await waitFor("clients are sent there", async () => (await sentTo(master.port)) === `${HOST}:${port}`);
  });

  test("of a server of another version, of something else, of nothing: the reason is said, once", async () => {
    const http = Bun.serve({ hostname: HOST, port: 0, fetch: () => new Response("hello") });
    let attempts = 0;
    const mute = Bun.listen({
      hostname: HOST,
      port: 0,
      socket: {
        open(socket) {
          attempts++;
          socket.write("SSH-2.0-OpenSSH_9.2\r\n");
        },
        data() {},
      },
    });
    using newer = startFakeServer(() => [encodeError(new RepriseError("version", "servers link by version 9 here"))]);
    try {
      await using a = await start(freePort(), newer.port);
      await said(a, `cannot join ${newer.address}: servers link by version 9 here`);
      await goesOn(a, () => newer.hellos.length);
      await using b = await start(freePort(), http.port!);
      await said(b, `${HOST}:${http.port}`, "trying again");
      await using c = await start(freePort(), mute.port);
      await said(c, `cannot join ${HOST}:${mute.port}: not the reprise protocol`);
      await goesOn(c, () => attempts);
    } finally {
      http.stop(true);
      mute.stop(true);
    }
  });

  test.each(["", "nonsense:port", ":2121", "a:1,b:2", "0.0.0.0:2121", "http://a:80", "a:0", "a:99999", "a b:1"])(
    "of %j is none: usage",
    async (text) => {
      const run = Bun.spawnSync([
        process.execPath,
        join(HOME, "server.ts"),
        folder.path,
        "--port",
        "0",
        "--join",
        text,
      ]);
      expect({ status: run.exitCode, errors: run.stderr.toString() }).toEqual({
        status: 2,
        errors: expect.stringContaining("--join takes host:port"),
      });
    },
  );

  test("with a root that cannot be written it does not start; and nobody joins one that has such a root", async () => {
    using root = makeRoot({ ".reprise": "a file in its place", a: "one" });
    await using master = await startServer(root.path);
    const run = Bun.spawnSync([
      process.execPath,
      join(HOME, "server.ts"),
      root.path,
      "--port",
      "0",
      "--join",
      master.address,
    ]);
    expect(run.stderr.toString()).toContain("cannot be written");
    expect(run.exitCode).toBe(4);
    await using member = await start(freePort(), master.port);
    await said(member, `cannot join ${master.address}`, "cannot be written");
    await said(master, "no server can join this one");
    expect(await cat(master.address, "a")).toBe("one");
    expect(logged(master, "keeper", "restarted")).toEqual([]);
  });
});

// ---------------------------------------------------------------------------------------------------- what a master sends

describe("a master that is none", () => {
  const joined = { kind: "joined", node: "fake", ledger: "l", secret: "s".repeat(43) };
  const record = { path: "x", revision: 1, origin: "fake", over: "", ...fileOf("x") };
  const stretchOf = (part: object) => ({
    kind: "stretch",
    pruned: 0,
    stretch: { after: 0, revision: 1, records: [record], ...part },
  });
  const ofRecord = (part: object) => stretchOf({ records: [{ ...record, ...part }] });

  const wrong: [string, object][] = [
    ["a stretch of nothing", { kind: "stretch", pruned: 0 }],
    ["a record without a version", ofRecord({ kind: undefined })],
    ["a list of nothing", stretchOf({ records: [null] })],
    ["a path upwards", ofRecord({ path: "../x" })],
    ["a path that goes up within", ofRecord({ path: "a/../../b" })],
    ["an absolute path", ofRecord({ path: "/tmp/x" })],
    ["its own folder", ofRecord({ path: ".reprise/index.sqlite" })],
    ["a path of 5 kB", ofRecord({ path: `${"p".repeat(99)}/`.repeat(50) })],
    ["a name with NUL", ofRecord({ path: "a\u0000b" })],
    ["a revision that is no number", ofRecord({ revision: "9" })],
    ["a decision of nothing", { kind: "decided", id: 1, decisions: [null] }],
    ["nothing known", { kind: "hello" }],
    ["a redirect", { redirect: true }],
  ];

  test("its member ends the link over what is wrong, and changes nothing", async () => {
    let links = 0;
    using master = startFakeServer((request) => {
      if (request.action !== "link" || request.message.kind !== "join") return [];
      const [, message] = wrong[links++] ?? ["", joined];
      return [encodeLink(joined), "redirect" in message ? encodeRedirect(HOST, 1) : encodeLink(message)];
    });
    using root = makeRoot({ a: "one" });
    await using member = await startServer(root.path, { args: ["--join", master.address] });
    for (const [at, [what]] of wrong.entries()) {
      await waitFor(`the link is ended over ${what}`, () => links > at + 1);
      expect(readdirSync(root.path).sort()).toEqual([".reprise", "a"]);
    }
    await said(member, "not the reprise protocol");
    expect(logged(member, "keeper", "restarted")).toEqual([]);
    expect(await cat(member.address, "a")).toBe("one");
  });
});

// ---------------------------------------------------------------------------------------------------- other ways

describe("a root that changes its part", () => {
  const filesOf = (root: string) =>
    Object.fromEntries(
      readdirSync(root)
        .filter((name) => name !== ".reprise")
        .sort()
        .map((name) => [name, readFileSync(join(root, name), "utf8")]),
    );

  test("a replica goes alone, and comes back with what happened meanwhile", async () => {
    await using cluster = await startCluster({ replicas: 1, files: { a: "one", b: "two" } });
    const [a, b] = cluster.nodes as [Node, Node];
    await cluster.settled();
    await b.server.stop("SIGINT");
    await using alone = await startServer(b.root, { args: WRITABLE });
    expect((await statusOf(alone.address)).role).toBe("alone");
    expect(keeperOf(alone)).toBeUndefined();
    expect(await cat(alone.address, "a")).toBe("one");
    await put(alone.address, "c", "made alone");
    await put(alone.address, "a", "changed alone");
    expect((await runClient(alone.address, ["rm", "b"])).status).toBe(0);
    await alone.stop("SIGINT");
    await put(a.server.address, "d", "at the master meanwhile");
    await b.start();
    await cluster.live(1);
    await cluster.settled();
    expect(filesOf(a.root)).toEqual({ a: "changed alone", c: "made alone", d: "at the master meanwhile" });
    expect(filesOf(b.root)).toEqual(filesOf(a.root));
  });

  test("a member goes to another master: both trees are one, the first master's stays as it was", async () => {
    await using first = await startCluster({ replicas: 1, files: { a: "one", same: "as there" } });
    await using second = await startCluster({ replicas: 1, files: { z: "other", same: "as there", differs: "there" } });
    const member = first.replicas[0]!;
    await put(first.address, "differs", "here");
    await Promise.all([first.settled(), second.settled()]);
    await member.server.stop("SIGTERM");
    await using moved = await startServer(member.root, { args: [...WRITABLE, "--join", second.address] });
    await second.live(2);
    await waitFor("they are one", () => {
      const [there, here] = [second.master, member].map(({ root }) => ifStill(() => filesOf(root)) ?? {});
      return Object.keys(there!).length === 5 && Bun.deepEquals(there, here);
    });
    await second.settled();
    const all = filesOf(second.master.root);
    expect(all).toMatchObject({ a: "one", z: "other", same: "as there", differs: "there" });
    const [conflict] = Object.keys(all).filter((name) => name.includes(".conflict-"));
    expect(all[conflict!]).toBe("here");
    expect(filesOf(first.master.root)).toEqual({ a: "one", same: "as there", differs: "here" });
    await waitFor("the first has it no more", async () => (await sentTo(first.master.server.port)) === "here");
    expect((await statusOf(moved.address)).master).toBe(second.address);
  });

  test("a master with a ledger of its own joins another, and its members come along", async () => {
    await using cluster = await startCluster({ replicas: 1, files: { a: "one" } });
    const [old, member] = cluster.nodes as [Node, Node];
    await cluster.settled();
    using root = makeRoot({ z: "above" });
    await using top = await startServer(root.path, { args: WRITABLE });
    await old.server.stop("SIGINT");
    old.server = await startServer(old.root, { args: [...WRITABLE, "--join", top.address], port: old.server.port });
    await isLive(top, old.server);
    await isLive(old.server, member.server);
    for (const each of [root.path, old.root, member.root]) {
      await has(each, "a", "one");
      await has(each, "z", "above");
    }
    expect((await statusOf(old.server.address)).role).toBe("replica");
    await put(top.address, "new", "from the top");
    await has(member.root, "new", "from the top");
    await has(root.path, "new", "from the top");
  });
});

// ---------------------------------------------------------------------------------------------------- what it costs

test("a server that nobody has joined has no keeper, no index, and its own etags", async () => {
  using root = makeRoot({ a: "one" });
  await using server = await startServer(root.path, { args: WRITABLE });
  await put(server.address, "b", "two");
  expect(await cat(server.address, "b")).toBe("two");
  expect((await runClient(server.address, ["ls", "-lr"])).status).toBe(0);
  expect(await statusOf(server.address)).toMatchObject({ role: "alone", replicas: [] });
  expect(childrenOf(server.process.pid).length).toBe(2);
  expect(readdirSync(join(root.path, ".reprise")).filter((name) => name.includes("sqlite"))).toEqual([]);
  const storage = openFolder(root.path);
  const { etag } = await storage.stat("b");
  storage.close();
  const { output } = await runClient(server.address, ["stat", "b", "--json"]);
  expect(JSON.parse(output).etag).toBe(etag);
});

// ---------------------------------------------------------------------------------------------------- the end

describe("ending", () => {
  const allOf = (cluster: Cluster) => cluster.nodes.map(({ server }) => processesOf(server));
  const areGone = (pids: number[]) => waitFor(`${pids} are gone`, () => pids.every((pid) => !isAlive(pid)));

  test.each(["SIGINT", "SIGTERM"] as const)("%s leaves no process, of a member nor of a master", async (signal) => {
    await using cluster = await startCluster({ replicas: 1 });
    const [master, member] = allOf(cluster) as [number[], number[]];
    expect([master.length, member.length]).toEqual([4, 4]);
    expect(await cluster.replicas[0]!.server.stop(signal)).toBe(0);
    await areGone(member);
    await isGone(cluster.master.server, cluster.replicas[0]!.server);
    expect(logged(cluster.master.server, "member", "idle")).toEqual([]);
    expect(await cluster.master.server.stop(signal)).toBe(0);
    await areGone(master);
  });

  test("kill -9 of the supervisor ends its keeper, too", async () => {
    await using cluster = await startCluster({ replicas: 1 });
    for (const [at, pids] of allOf(cluster).entries()) {
      killHard(cluster.nodes[at]!.server.process.pid);
      await areGone(pids);
    }
  });

  test("SIGHUP cuts no link", async () => {
    await using cluster = await startCluster({ replicas: 1 });
    const [master, member] = cluster.nodes as [Node, Node];
    const pids = allOf(cluster).flat();
    for (const { server } of cluster.nodes) server.process.kill("SIGHUP");
    // What is asked now is answered behind the signal.
    await put(cluster.address, "x", "behind it");
    await cluster.settled();
    expect(allOf(cluster).flat()).toEqual(pids);
    await areLogged(member.server, "join", "ok");
    expect(logged(member.server, "join", "ok").length).toBe(1);
    expect(
      master.server.log.filter(({ event, status }) => event === "member" && !["joined", "live"].includes(status)),
    ).toEqual([]);
  });

  test.each([
    ["a master", 0],
    ["a member", 1],
  ])(
    "kill -9 of the keeper of %s: another takes over, and an upload that waits for it is answered",
    async (_, which) => {
      await using cluster = await startCluster({ replicas: 2 });
      const { server, root } = cluster.nodes[which]!;
      const keeper = keeperOf(server)!;
      process.kill(keeper, "SIGSTOP");
      // What goes to the master itself goes to a member of it.
      const upload = spawnClient(
        which === 0 ? cluster.replicas[0]!.server.address : server.address,
        ["put", "-", "-t", "x"],
        { stdin: "waits" },
      );
      const there = which === 0 ? cluster.replicas[0]!.root : root;
      await has(there, "x", "waits");
      expect(upload.exitCode).toBeNull();
      killHard(keeper);
      expect(await upload.exited).toBe(0);
      const next = await waitFor("there is another", () => keeperOf(server));
      expect(next).not.toBe(keeper);
      await cluster.live(2);
      await cluster.settled();
      for (const { root } of cluster.nodes) await has(root, "x", "waits");
      expect(server.workers().length).toBe(3);
      await areLogged(server, "keeper", "restarted");
      expect(logged(server, "keeper", "restarted").length).toBe(1);
    },
  );
});
