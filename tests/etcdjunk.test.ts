/** What looks like etcd and answers nonsense: an error in words, of whoever asked, and no process ends over it. */
import { afterAll, afterEach, beforeAll, describe, expect, setDefaultTimeout, test } from "bun:test";
import { Etcd, parseCluster } from "../etcd.ts";
import { EtcdLedger } from "../etcdledger.ts";
import type { Version } from "../ledger.ts";
import { RepriseError } from "../protocol.ts";
import { noEtcd, startEtcd } from "./engines.ts";
import { makeRoot, runClient, seeded, startServer, TEST_MS, waitFor } from "./fixtures.ts";
import { Talk } from "./talk.ts";

setDefaultTimeout(TEST_MS);
if (noEtcd) console.log(`skipped: nonsense in place of etcd's answers: ${noEtcd}`);

const MIB = 1024 * 1024;
const A: Version = { kind: "file", size: 1, mtime: 1, sha256: "a".repeat(64) };
const GONE: Version = { kind: "gone", size: 0, mtime: 0, sha256: "" };

/** What is answered to a path, given what etcd has answered; undefined: that. Of a watch it is one message. */
type Distort = (path: string, answer: string) => string | ReadableStream | undefined;

/** A way to etcd on which answers become others. */
class Distorter implements Disposable {
  distort: Distort = () => undefined;
  readonly #server;

  constructor(endpoint: string) {
    this.#server = Bun.serve({
      hostname: "127.0.0.1",
      port: 0,
      idleTimeout: 0,
      fetch: async (request) => {
        const { pathname } = new URL(request.url);
        const { signal } = request;
        const options = { method: "POST", body: await request.text(), signal };
        const answer = await fetch(endpoint + pathname, options);
        if (pathname === "/v3/watch") return new Response(this.#watched(answer.body!));
        const text = await answer.text();
        return new Response((this.distort(pathname, text) ?? text) as string, { status: answer.status });
      },
    });
  }

  get host(): string {
    return `127.0.0.1:${this.#server.port}`;
  }

  async *#watched(body: ReadableStream<Uint8Array>) {
    const decoder = new TextDecoder();
    let rest = "";
    for await (const chunk of body) {
      const lines = (rest + decoder.decode(chunk, { stream: true })).split("\n");
      rest = lines.pop()!;
      for (const line of lines) {
        const other = this.distort("/v3/watch", line);
        if (other instanceof ReadableStream) yield* other as unknown as AsyncIterable<Uint8Array>;
        else yield `${other ?? line}\n`;
      }
    }
  }

  [Symbol.dispose](): void {
    this.#server.stop(true);
  }
}

describe.skipIf(noEtcd !== undefined)("in place of etcd's answers", () => {
  let etcd: Awaited<ReturnType<typeof startEtcd>>;
  let clusters = 0;
  const open: { close(): void }[] = [];
  beforeAll(async () => {
    etcd = await startEtcd();
  });
  afterEach(() => {
    for (const one of open.splice(0)) one.close();
  });
  afterAll(async () => etcd?.[Symbol.asyncDispose]());

  function ledgerBy({ host }: Distorter, name = `junk-${++clusters}`): EtcdLedger {
    const cluster = parseCluster(`etcd://${host}/${name}`, {});
    const ledger = new EtcdLedger(new Etcd(cluster, { patienceMs: 20, tryMs: 5000 }), { store: "folder" });
    open.push(ledger);
    return ledger;
  }

  const me = { node: "me", address: "me:1", known: 0, revision: 0, live: true };
  let changes = 0;
  /** All that is asked of etcd. */
  const ASKED: { [what: string]: (ledger: EtcdLedger) => Promise<unknown> } = {
    open: (ledger) => ledger.open(),
    "append what is new": (ledger) => ledger.append("me", [{ path: `new-${++changes}`, base: 0, version: A }]),
    "append what is there": async (ledger) =>
      ledger.append("me", [{ path: "there", base: (await ledger.newest("there"))?.revision ?? 0, version: GONE }]),
    newest: (ledger) => ledger.newest("there"),
    read: (ledger) => ledger.read(0, 1000),
    members: (ledger) => ledger.members(),
    join: (ledger) => ledger.join({ node: "me", address: "me:1", revision: 0 }),
    beat: (ledger) => ledger.beat(me),
    leave: (ledger) => ledger.leave(),
    prune: (ledger) => ledger.prune(1_000_000),
    renew: (ledger) => ledger.renew(),
  };

  /** Follows until all is there or it is said that it is lost. */
  function followed(ledger: EtcdLedger, after: number): Promise<RepriseError | undefined> {
    const { promise, resolve } = Promise.withResolvers<RepriseError | undefined>();
    ledger.follow(after, {
      onStretch: () => {},
      onMembers: () => {},
      onCurrent: () => resolve(undefined),
      onLost: resolve,
      onBack: () => {},
      onRenewed: () => resolve(undefined),
    });
    return promise.finally(() => ledger.unfollow());
  }

  function expectInWords(error: unknown, { host }: Distorter): void {
    expect(error).toBeInstanceOf(RepriseError);
    const { code, message } = error as RepriseError;
    expect(["busy", "version", "failed", "too_large"]).toContain(code);
    if (code !== "failed") expect(message).toContain(host);
    expect(message).not.toMatch(/undefined|null|is not an? /);
  }

  const endless = () => new ReadableStream({ pull: (controller) => controller.enqueue(Buffer.alloc(MIB, " ")) });
  const kvs = (kv: object) => JSON.stringify({ header: { revision: "9" }, kvs: [kv] });
  const JUNK: { [what: string]: () => string | ReadableStream } = {
    nothing: () => "",
    "a page": () => "<!doctype html>",
    null: () => "null",
    "a text": () => '"text"',
    "a list": () => "[]",
    "an empty answer": () => "{}",
    "no list of keys": () => '{"kvs":5,"result":5,"ID":{}}',
    "keys that are none": () => kvs({ key: 5 }),
    "a key without a revision": () => kvs({ key: "eA==" }),
    "keys of somebody else": () => kvs({ key: "eA==", mod_revision: "3" }),
    "more, and nothing": () => '{"header":{"revision":"9"},"more":true}',
    "answers that are none": () => '{"header":{"revision":"9"},"succeeded":true,"responses":[null,5,{}]}',
    "too few answers": () => '{"header":{"revision":"9"},"succeeded":true}',
    "no header": () => '{"header":null,"responses":[]}',
    "events that are none": () => '{"result":{"events":[{},null]}}',
    "events without keys": () => '{"result":{"events":[{"kv":{"value":5}}]}}',
    "an error that is none": () => '{"error":{"message":5,"code":"x"}}',
    "no end": endless,
  };

  test.each(Object.entries(JUNK))("%s", async (_, junk) => {
    using way = new Distorter(etcd.endpoints[0]!);
    const ledger = ledgerBy(way);
    await ledger.open();
    await ledger.append("me", [{ path: "there", base: 0, version: A }]);
    for (const bad of ["/v3/kv/range", "/v3/kv/txn", "/v3/lease/grant", "/v3/lease/keepalive", "/v3/watch"]) {
      way.distort = (path) => (path === bad ? junk() : undefined);
      for (const work of Object.values(ASKED)) {
        const error = await work(ledger).then(
          () => undefined,
          (error) => error,
        );
        if (error) expectInWords(error, way);
      }
      // One that cannot begin says so; one that is cut goes on trying.
      if (bad === "/v3/kv/txn") expectInWords(await followed(ledger, 0), way);
      else await followedFor(ledger);
    }
    way.distort = () => undefined;
    await ledger.open();
    expect(await followed(ledger, 0)).toBeUndefined();
    await ledger.append("me", [{ path: `well-${++changes}`, base: 0, version: A }]);
    expect((await ledger.read(0, 1000)).records.map(({ path }) => path)).toContain(`well-${changes}`);
  });

  /** With something to be told of. */
  async function followedFor(ledger: EtcdLedger): Promise<undefined> {
    const lost = followed(ledger, changes % 2);
    await ledger.append("me", [{ path: `watched-${++changes}`, base: 0, version: A }]).catch(() => {});
    await Promise.race([lost, Bun.sleep(50)]);
    ledger.unfollow();
  }

  test("a piece of them that is something else, anywhere", async () => {
    const random = seeded(6);
    using way = new Distorter(etcd.endpoints[0]!);
    const ledger = ledgerBy(way);
    await ledger.open();
    await ledger.append("me", [{ path: "there", base: 0, version: A }]);
    const names = Object.keys(ASKED);
    let failures = 0;
    for (let round = 0; round < 400; round++) {
      way.distort = (_, answer) => (random(2) === 0 ? distorted(answer, random) : undefined);
      const name = names[random(names.length)]!;
      const error = await ASKED[name]!(ledger).then(
        () => undefined,
        (error) => error,
      );
      if (error !== undefined && !(error instanceof RepriseError)) throw error;
      if (error) failures++;
      if (round % 20 === 0) await followedFor(ledger);
    }
    expect(failures).toBeGreaterThan(20);
  });

  test("a server goes on serving, says why it takes no changes, and takes them again when it may", async () => {
    using way = new Distorter(etcd.endpoints[0]!);
    using root = makeRoot({ mine: "x" });
    const args = ["--writable", "--cluster", `etcd://${way.host}/server-${++clusters}`];
    await using server = await startServer(root.path, { args });
    const problem = async () => {
      using talk = await Talk.to(server.port);
      const { problem, role } = await talk.status();
      return { problem: problem as string | undefined, role };
    };
    const isWell = async () => (await problem()).problem === undefined && (await problem()).role === "member";
    await waitFor("it is a member", isWell);
    const processes = server.workers().sort();
    for (const junk of ["a page", "an empty answer", "answers that are none", "events that are none"]) {
      way.distort = () => JUNK[junk]!();
      await waitFor("it says so", async () => (await problem()).problem?.includes(way.host));
      expect((await runClient(server.address, ["cat", "mine"])).output).toBe("x");
      way.distort = () => undefined;
      await waitFor("it is well again", isWell);
    }
    expect((await runClient(server.address, ["put", "-", "-t", "new"], { stdin: "y" })).status).toBe(0);
    expect(server.workers().sort()).toEqual(processes);
    expect(server.stderr()).not.toContain("internal error");
  });
});

const OTHERS = [undefined, null, 0, -1, 1.5, "", "x", "99999999999999999999", true, [], {}, [null], "é\n".repeat(100)];

/** One value of a JSON text in place of which is another. */
function distorted(text: string, random: (limit: number) => number): string {
  if (random(10) === 0) return text.slice(0, random(text.length));
  let value: unknown;
  try {
    value = JSON.parse(text);
  } catch {
    return text;
  }
  const places: [object, string][] = [];
  const look = (value: unknown) => {
    if (typeof value !== "object" || value === null) return;
    for (const [name, below] of Object.entries(value)) {
      places.push([value, name]);
      look(below);
    }
  };
  look(value);
  const [holder, name] = places[random(places.length)] ?? [{}, "x"];
  (holder as { [name: string]: unknown })[name] = OTHERS[random(OTHERS.length)];
  return JSON.stringify(value);
}
