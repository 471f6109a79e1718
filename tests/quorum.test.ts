/**
 * Servers whose ledger is kept by etcd: all are equals, whoever is killed. What becomes of changes is tested with
 * cluster.test.ts, for there is one keeper for both; here is what is different without a master.
 */
import { afterAll, afterEach, beforeAll, describe, expect, setDefaultTimeout, test } from "bun:test";
import { existsSync, mkdirSync, readFileSync, rmSync, writeFileSync } from "node:fs";
import { join } from "node:path";
import { Etcd as EtcdClient, encoded, parseCluster, put } from "../etcd.ts";
import { objectIn } from "../etcdkeys.ts";
import { EtcdLedger, type LiveMember } from "../etcdledger.ts";
import type { ClusterState, MemberStatus } from "../hub.ts";
import { encodeInfo } from "../protocol.ts";
import { Quorum } from "../quorum.ts";
import { addToken } from "../tokens.ts";
import { type Cluster, type Node, startCluster, statusOf } from "./clusters.ts";
import { type Etcd, noEtcd, startEtcd } from "./engines.ts";
import {
  HOME,
  makeRoot,
  randomBytes,
  runClient,
  type Server,
  sha256,
  startFakeServer,
  startServer,
  TEST_MS,
  temporaryFolder,
  waitFor,
  writeLargeFile,
} from "./fixtures.ts";
import { Talk } from "./talk.ts";

setDefaultTimeout(TEST_MS);
if (noEtcd !== undefined) console.log(`skipped: servers of one etcd (${noEtcd})`);

/** Starts a server that is not to start; returns its status and what it said. */
async function refused(args: string[], env: Record<string, string> = {}): Promise<{ status: number; errors: string }> {
  using root = makeRoot({});
  const cmd = [process.execPath, join(HOME, "server.ts"), root.path, "--port", "0", ...args];
  await using child = Bun.spawn({ cmd, env: { ...process.env, ...env }, stdio: ["ignore", "ignore", "pipe"] });
  const errors = await new Response(child.stderr).text();
  return { status: await child.exited, errors };
}

const liveOf = ({ replicas }: { replicas: MemberStatus[] }) => replicas.filter(({ state }) => state === "live");

describe.skipIf(noEtcd !== undefined)("three servers of one etcd", () => {
  let etcd: Etcd;
  let cluster: Cluster;
  beforeAll(async () => {
    etcd = await startEtcd({ members: 3 });
    cluster = await startCluster({ ledger: etcd.url("files"), files: { "at/the/start": "1", top: "2" } });
  });
  afterAll(async () => {
    await cluster?.[Symbol.asyncDispose]();
    await etcd?.[Symbol.asyncDispose]();
  });

  test("have the same files, and say who they are", async () => {
    const tree = await cluster.settled();
    expect(tree.map((line) => line.split(" ")[0])).toEqual(["at", "at/the", "at/the/start", "top"]);
    for (const node of cluster.nodes) {
      const status = await node.status();
      expect(status.role).toBe("member");
      expect(status.master).toContain("/files");
      // In the order of names that each has made for itself.
      const others = cluster.nodes.filter((other) => other !== node).map(({ server }) => server.address);
      expect(new Set(liveOf(status).map(({ address }) => address))).toEqual(new Set(others));
    }
  });

  test("each sends clients to all in turn, itself among them, and whom it sends is answered there", async () => {
    const rounds = 8;
    for (const { server } of cluster.nodes) {
      const redirects = () => server.log.filter(({ event }) => event === "redirect");
      const before = redirects().length;
      for (let count = 0; count < 3 * rounds; count++) {
        const { status } = await runClient(server.address, ["cat", "top"]);
        expect(status).toBe(0);
      }
      await waitFor("all are logged", () => redirects().length >= before + 2 * rounds);
      const sent = redirects().slice(before);
      const counts = cluster.nodes.map((other) => sent.filter(({ to }) => to === other.server.address).length);
      const expected = cluster.nodes.map((other) => (other.server === server ? 0 : rounds));
      expect(counts).toEqual(expected);
    }
  });

  test("what is put through one is read from each at once", async () => {
    for (let count = 0; count < 12; count++) {
      const node = cluster.nodes[count % 3]!;
      const content = `${count} by ${node.name}`;
      const put = await runClient(node.server.address, ["put", "-", "-t", "news"], { stdin: content });
      expect(put.status).toBe(0);
      for (const other of cluster.nodes) {
        expect((await runClient(other.server.address, ["cat", "news"])).output).toBe(content);
      }
    }
    await cluster.settled();
  });

  test("changes by other programs, removals and moves reach all", async () => {
    const [a, b, c] = cluster.nodes as [Node, Node, Node];
    mkdirSync(join(b.root, "made/by"), { recursive: true });
    writeFileSync(join(b.root, "made/by/hand"), "x");
    await waitFor("it is everywhere", () => [a, c].every(({ root }) => existsSync(join(root, "made/by/hand"))));
    expect((await runClient(a.server.address, ["mv", "made/by/hand", "made/hand"])).status).toBe(0);
    expect((await runClient(c.server.address, ["rm", "-r", "at"])).status).toBe(0);
    const tree = await cluster.settled();
    expect(tree.map((line) => line.split(" ")[0])).toEqual(["made", "made/by", "made/hand", "news", "top"]);
  });

  test("two changes of one name while etcd is not there: one wins, the other is kept beside it", async () => {
    const [a, b] = cluster.nodes as [Node, Node];
    for (const member of [0, 1]) await etcd.kill(member);
    await waitFor("they know", async () => (await a.status()).problem && (await b.status()).problem);
    writeFileSync(join(a.root, "top"), "changed by a");
    writeFileSync(join(b.root, "top"), "changed by b");
    for (const member of [0, 1]) await etcd.restart(member);
    await cluster.live(2);
    const isTop = (line: string) => line.startsWith("top");
    await waitFor("both are everywhere", async () => (await cluster.settled()).filter(isTop).length === 2);
    const names = (await cluster.settled()).filter(isTop);
    const contents = names.map((line) => readFileSync(join(a.root, line.split(" ")[0]!), "utf8"));
    expect(contents.sort()).toEqual(["changed by a", "changed by b"]);
    expect(names.some((line) => line.startsWith("top.conflict-"))).toBe(true);
  });

  test("without etcd files are read, and changes refused for now; with it all goes on", async () => {
    const [a, b] = cluster.nodes as [Node, Node];
    using root = temporaryFolder();
    await using front = await startServer(root.path, { args: ["--redirect-only", "--cluster", etcd.url("files")] });
    await waitFor("it knows all", async () => liveOf(await statusOf(front.address)).length === 3);
    for (const member of [0, 1, 2]) await etcd.kill(member);
    await waitFor("all know", async () => {
      const statuses = await Promise.all(cluster.nodes.map((node) => node.status()));
      return statuses.every(({ problem }) => problem !== undefined);
    });
    await waitFor("it knows, too", async () => (await statusOf(front.address)).problem);
    for (const address of [a.server.address, front.address])
      expect((await runClient(address, ["cat", "top"])).status).toBe(0);
    const put = await runClient(b.server.address, ["put", "-", "-t", "later", "--retries", "1"], { stdin: "x" });
    expect(put.status).toBe(9);
    expect(put.errors).toContain("no change can be made now");
    expect(put.errors).toContain(etcd.endpoints[0]!.replace("http://", ""));
    expect(existsSync(join(b.root, "later"))).toBe(false);
    const waiting = runClient(b.server.address, ["put", "-", "-t", "later", "--retries", "100"], { stdin: "later" });
    // None answers until two are there.
    await Promise.all([0, 1, 2].map((member) => etcd.restart(member)));
    expect((await waiting).status).toBe(0);
    await cluster.live(2);
    await cluster.settled();
    expect(readFileSync(join(a.root, "later"), "utf8")).toBe("later");
  });

  test("one that is killed is left out by the others, comes back by itself, and has what it missed", async () => {
    const [a, b, c] = cluster.nodes as [Node, Node, Node];
    writeFileSync(join(a.root, "removed"), "x");
    await waitFor("it is everywhere", () => [b, c].every(({ root }) => existsSync(join(root, "removed"))));
    await c.kill();
    await waitFor("the others know", async () => {
      return [await a.status(), await b.status()].every((status) => liveOf(status).length === 1);
    });
    for (const node of [a, b]) {
      const put = await runClient(node.server.address, ["put", "-", "-t", `without-c-${node.name}`], { stdin: "x" });
      expect(put.status).toBe(0);
    }
    rmSync(join(a.root, "removed"));
    await waitFor("it is gone", () => !existsSync(join(b.root, "removed")));
    await c.start();
    await cluster.live(2);
    const tree = await cluster.settled();
    expect(tree.some((line) => line.startsWith("without-c-A"))).toBe(true);
    expect(tree.some((line) => line.startsWith("removed"))).toBe(false);
  });

  test("a download goes on at another when the one that serves it is killed", async () => {
    const [a] = cluster.nodes as [Node];
    const digest = writeLargeFile(join(a.root, "large"), 64 * 1024 * 1024);
    await cluster.settled();
    using folder = temporaryFolder();
    const servers = cluster.nodes.map(({ server }) => server.address).join();
    const before = a.server.log.length;
    const run = runClient(servers, ["get", "large", "-d", folder.path, "--limit-rate", "16M"]);
    await waitFor("it is under way", () => existsSync(join(folder.path, "large.part")));
    const to = a.server.log.slice(before).find(({ event }) => event === "redirect")?.to;
    const victim = cluster.nodes.find(({ server }) => server.address === to) ?? a;
    await victim.kill();
    expect((await run).status).toBe(0);
    expect(await sha256(join(folder.path, "large"))).toBe(digest);
    await victim.start();
    await cluster.live(2);
  });

  test("one that is silent and does not answer any more gets no client, however long its lease is", async () => {
    const api = new EtcdClient(parseCluster(etcd.url("files")));
    const lease = await api.grant(600);
    const { kvs } = await api.range({ key: encoded("/reprise/files/ledger") });
    const { id } = objectIn(kvs![0]!)!;
    const fake = startFakeServer(() => [encodeInfo({ node: "fake" })]);
    const far = 2 ** 50;
    const said = JSON.stringify({ address: fake.address, known: far, revision: far, live: true, ledger: id });
    await api.txn({ success: [put("/reprise/files/members/fake", said, lease)] });
    const found = async (state: MemberStatus["state"]) => {
      const statuses = await Promise.all(cluster.nodes.map((node) => node.status()));
      const members = statuses.map(({ replicas }) => replicas.find(({ address }) => address === fake.address));
      return members.every((member) => member?.state === state) ? members : undefined;
    };
    await waitFor("it is live", () => found("live"));
    fake[Symbol.dispose]();
    const members = await waitFor("it is left out", () => found("joining"));
    for (const member of members) expect(member?.problem).toContain("not to be reached");
    await api.revoke(lease);
    api.close();
    await cluster.live(2);
  });

  test("one that only sends clients on has no files, and sends them in turn", async () => {
    using root = temporaryFolder();
    await using front = await startServer(root.path, { args: ["--redirect-only", "--cluster", etcd.url("files")] });
    await waitFor("it knows all", async () => liveOf(await statusOf(front.address)).length === 3);
    for (let count = 0; count < 9; count++) {
      const { status, output } = await runClient(front.address, ["cat", "top"]);
      expect([status, output]).toEqual([0, readFileSync(join(cluster.master.root, "top"), "utf8")]);
    }
    const sent = () => front.log.filter(({ event }) => event === "redirect").map(({ to }) => to as string);
    await waitFor("all are logged", () => sent().length >= 9);
    expect(new Set(sent())).toEqual(new Set(cluster.nodes.map(({ server }) => server.address)));
    expect(existsSync(join(root.path, ".reprise"))).toBe(false);
    // Nobody is sent to it, and nobody waits for it.
    for (const node of cluster.nodes) expect(liveOf(await node.status())).toHaveLength(2);
    expect((await runClient(front.address, ["put", "-", "-t", "through"], { stdin: "x" })).status).toBe(0);
  });
});

describe.skipIf(noEtcd !== undefined)("Quorum", () => {
  let etcd: Etcd;
  let clusters = 0;
  const open: { close(): void }[] = [];
  beforeAll(async () => {
    etcd = await startEtcd();
  });
  afterEach(() => {
    for (const one of open.splice(0)) one.close();
  });
  afterAll(async () => etcd?.[Symbol.asyncDispose]());

  /** A member that follows the ledger, and the ledger as another has it: what that one says of itself is up to the test. */
  async function start() {
    const cluster = parseCluster(etcd.url(`quorum-${++clusters}`));
    const ledger = new EtcdLedger(new EtcdClient(cluster), { store: "folder" });
    await ledger.open();
    const told = { known: 0 };
    const quorum: Quorum = new Quorum({
      cluster,
      store: "folder",
      tls: false,
      node: "a",
      address: "a:1",
      isServing: true,
      onJoined: () => quorum.read(0),
      onMessage: (message) => {
        if (message.kind === "stretch") told.known = message.stretch.revision;
        sayAlive();
      },
      onMembers: () => {},
      onLost: () => {},
      check: async () => {},
      newest: () => undefined,
    });
    const sayAlive = () => {
      const { known } = told;
      quorum.say({ kind: "alive", received: known, known, revision: known, nodes: [] });
    };
    const beats = setInterval(() => quorum.beat(), 100);
    open.push({ close: () => clearInterval(beats) }, quorum, ledger);
    const other = { node: "b", address: "b:1", known: 0, revision: 0, live: true };
    let last = other;
    const again = setInterval(() => void ledger.beat(last).catch(() => {}), 1000);
    open.push({ close: () => clearInterval(again) });
    return {
      quorum,
      told,
      sayAlive,
      /** The revision of a change by somebody. */
      append: async (path: string) => {
        const proposals = [{ path, base: 0, version: { kind: "folder", size: 0, mtime: 0, sha256: "" } as const }];
        const { records } = await ledger.append("c", proposals);
        return records[0]!.revision;
      },
      say: async (said: Partial<LiveMember>) => {
        last = { ...other, ...said };
        await ledger.beat(last);
      },
      get equal() {
        return quorum.equals.find(({ node }) => node === "b");
      },
    };
  }

  test("sends nobody to one that does not know all that was in the ledger when it became live", async () => {
    const it = await start();
    const revision = await it.append("before");
    await it.say({ known: revision - 1 });
    void it.quorum.run();
    await waitFor("all is known here", () => it.told.known === revision);
    await waitFor("the other is there", () => it.equal?.unreached === undefined && it.equal);
    expect(it.equal!.state).toBe("joining");
    await it.say({ known: revision });
    await waitFor("it is sent clients", () => it.equal!.state === "live");
  });

  test("has all that is missing where one that only sends clients on is there, too", async () => {
    const it = await start();
    const revision = await it.append("before");
    await it.say({ known: revision });
    void it.quorum.run();
    await waitFor("all are here", () => it.quorum.isEveryoneHere);
    await it.say({ known: revision, live: false });
    await waitFor("one is not", () => !it.quorum.isEveryoneHere);
    await it.say({ known: revision, live: false, redirectOnly: true });
    await waitFor("all that have files are here", () => it.quorum.isEveryoneHere);
  });

  test("sends nobody to one that comes back before it knows what it was not waited for with", async () => {
    const it = await start();
    const first = await it.append("first");
    await it.say({ known: first });
    void it.quorum.run();
    await waitFor("it is live", () => it.equal?.state === "live");
    const behind = await it.append("it does not take this in");
    await waitFor("it is left out", () => !it.equal!.isWaitedFor);
    const missed = await it.append("nobody waits for it");
    await waitFor("that is known here", () => it.told.known === missed);
    await it.say({ known: behind });
    await waitFor("it is waited for again", () => it.equal!.isWaitedFor);
    expect(it.equal!.state).toBe("joining");
    await it.say({ known: missed });
    await waitFor("it is sent clients", () => it.equal!.state === "live");
  });
});

describe.skipIf(noEtcd !== undefined)("a server that only sends clients on", () => {
  let etcd: Etcd;
  let cluster: Cluster;
  beforeAll(async () => {
    etcd = await startEtcd();
    cluster = await startCluster({ ledger: etcd.url("files"), replicas: 0, files: { mine: "x" } });
    await cluster.settled();
  });
  afterAll(async () => {
    await cluster?.[Symbol.asyncDispose]();
    await etcd?.[Symbol.asyncDispose]();
  });
  const startFront = (root: string, args: string[] = []) =>
    startServer(root, { args: ["--redirect-only", "--cluster", etcd.url("files"), ...args] });
  const knowsOne = async ({ address }: Server) => liveOf(await statusOf(address)).length === 1;

  test("is joined by nobody, who would get no files from it", async () => {
    using root = temporaryFolder();
    using below = temporaryFolder();
    await using front = await startFront(root.path);
    await waitFor("it knows the other", () => knowsOne(front));
    await using joining = await startServer(below.path, { args: ["--join", front.address] });
    await waitFor("the refusal", () => joining.stderr().includes("only sends clients on"));
    expect(joining.stderr()).toContain("cannot join");
  });

  test("is missed by nobody when it has gone", async () => {
    using root = temporaryFolder();
    const [node] = cluster.nodes as [Node];
    {
      await using front = await startFront(root.path);
      await waitFor("it knows the other", () => knowsOne(front));
      // Nobody is sent to it, nor waits for it: it is no replica.
      expect((await node.status()).replicas).toEqual([]);
    }
    const ledger = new EtcdLedger(new EtcdClient(parseCluster(etcd.url("files"))), { store: "folder" });
    await ledger.open();
    expect((await ledger.members()).map(({ address }) => address)).toEqual([node.server.address]);
    ledger.close();
  });

  test("does so with a token for one folder, too", async () => {
    using root = temporaryFolder();
    using folder = temporaryFolder();
    const tokens = join(folder.path, "tokens");
    const token = addToken(tokens, { name: "one", access: "read", folder: "some" });
    await using front = await startFront(root.path, ["--tokens", tokens]);
    const [node] = cluster.nodes as [Node];
    const sent = async () => {
      using talk = await Talk.to(front.port, token);
      return await talk.stat("").catch((error) => error);
    };
    await waitFor("it knows the other", async () => (await sent()).code !== "busy");
    expect(String(await sent())).toContain(`redirected to ${node.server.address}`);
  });
});

describe.skipIf(noEtcd !== undefined)("a server does not start, with status 1,", () => {
  let etcd: Etcd;
  beforeAll(async () => {
    etcd = await startEtcd({ password: "secret" });
  });
  afterAll(async () => etcd?.[Symbol.asyncDispose]());
  const env = { REPRISE_ETCD_USER: "root", REPRISE_ETCD_PASSWORD: "secret" };

  test("where no etcd is, and says where that is", async () => {
    const { status, errors } = await refused(["--cluster", "etcd://127.0.0.1:9,localhost:9/x"]);
    expect(status).toBe(1);
    expect(errors).toContain("127.0.0.1:9");
    expect(errors).toContain("localhost:9");
  });

  test("without a password, or with a wrong one", async () => {
    expect(await refused(["--cluster", etcd.url("x")])).toMatchObject({ status: 1 });
    const wrong = await refused(["--cluster", etcd.url("x")], { ...env, REPRISE_ETCD_PASSWORD: "wrong" });
    expect(wrong.status).toBe(1);
    expect(wrong.errors).toContain("password");
  });

  test("where the ledger is of another version", async () => {
    const b64 = (text: string) => Buffer.from(text).toString("base64");
    const post = async (path: string, body: object, headers = {}) => {
      const response = await fetch(etcd.endpoints[0] + path, { method: "POST", body: JSON.stringify(body), headers });
      return (await response.json()) as { token?: string };
    };
    const { token } = await post("/v3/auth/authenticate", { name: "root", password: "secret" });
    const value = b64(JSON.stringify({ version: 99, id: "x", store: "folder" }));
    await post("/v3/kv/put", { key: b64("/reprise/other/ledger"), value }, { authorization: token });
    const { status, errors } = await refused(["--cluster", etcd.url("other")], env);
    expect(status).toBe(1);
    expect(errors).toContain("99");
  });

  test.each([
    [["--cluster", "etcd://127.0.0.1:1/x", "--join", "127.0.0.1:1"], "exclude"],
    [["--cluster", "http://127.0.0.1:1/x"], "--cluster"],
    [["--cluster", "etcd://127.0.0.1:1"], "--cluster"],
    [["--cluster", "etcd://127.0.0.1:1/a/b"], "--cluster"],
    [["--redirect-only"], "--cluster"],
    [["--redirect-only", "--writable", "--cluster", "etcd://127.0.0.1:1/x"], "exclude"],
    [["--cluster", "etcd://127.0.0.1:1/x", "--host", "0.0.0.0"], "--advertise"],
  ])("%j is a usage error", async (args, text) => {
    const { status, errors } = await refused(args);
    expect(status).toBe(2);
    expect(errors).toContain(text);
  });
});

test.skipIf(noEtcd !== undefined)("a root of one cluster is not made part of another by a mistyped name", async () => {
  await using etcd = await startEtcd();
  await using cluster = await startCluster({ replicas: 0, ledger: etcd.url("right"), files: { mine: "x" } });
  const { master } = cluster;
  const isMember = ({ role, problem }: ClusterState) => role === "member" && problem === undefined;
  await waitFor("it is a member", async () => isMember(await master.status()));
  await master.server.stop("SIGTERM");
  const cmd = [process.execPath, join(HOME, "server.ts"), master.root, "--port", "0", "--writable"];
  await using child = Bun.spawn({ cmd: [...cmd, "--cluster", etcd.url("wrong")], stdio: ["ignore", "ignore", "pipe"] });
  const errors = await new Response(child.stderr).text();
  expect([await child.exited, errors]).toEqual([1, expect.stringContaining('"right"')]);
  await master.start();
  await waitFor("it is a member again", async () => isMember(await master.status()));
});

test.skipIf(noEtcd !== undefined)(
  "a master that goes over to etcd keeps its files, and so do those that follow",
  async () => {
    await using etcd = await startEtcd();
    const content = randomBytes(100_000);
    await using cluster = await startCluster({ replicas: 1, files: { mine: content, both: "before" } });
    await cluster.settled();
    for (const { server } of cluster.nodes) await server.stop("SIGTERM");
    // As somebody would: the same folders, another option.
    const args = ["--writable", "--cluster", etcd.url("moved")];
    await using a = await startServer(cluster.nodes[0]!.root, { args });
    await using b = await startServer(cluster.nodes[1]!.root, { args });
    for (const { address } of [a, b])
      await waitFor("both are live", async () => liveOf(await statusOf(address)).length === 1);
    expect((await runClient(a.address, ["put", "-", "-t", "both"], { stdin: "after" })).status).toBe(0);
    expect((await runClient(b.address, ["cat", "both"])).output).toBe("after");
    expect(readFileSync(join(cluster.nodes[1]!.root, "mine")).equals(content)).toBe(true);
  },
);
