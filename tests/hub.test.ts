/**
 * What the processes of a server say to each other about its cluster: clients sent on in turn, links, changes announced,
 * versions by their content, a keeper that dies. The keeper is the test: the server runs with a keeper.ts that only hands
 * on what it is told.
 */
import { Database } from "bun:sqlite";
import { afterAll, beforeAll, describe, expect, setDefaultTimeout, test } from "bun:test";
import {
  copyFileSync,
  existsSync,
  mkdirSync,
  readdirSync,
  readFileSync,
  rmSync,
  symlinkSync,
  writeFileSync,
} from "node:fs";
import { connect, type Socket } from "node:net";
import { networkInterfaces } from "node:os";
import { join } from "node:path";
import type { Socket as BunSocket } from "bun";
import { openChanges } from "../changes.ts";
import {
  addressOf,
  type ClusterState,
  type ForKeeper,
  type FromKeeper,
  type MemberStatus,
  Rotation,
  Versions,
  withTargets,
} from "../hub.ts";
import { Index } from "../index.ts";
import { GONE, type Record as LedgerRecord, type Version } from "../ledger.ts";
import {
  type Answer,
  DIRECT,
  decodeAnswer,
  type Entry,
  encodeHello,
  encodeRequest,
  FrameDecoder,
  MAX_ANSWER_BYTES,
  type Put,
  type Request,
  TAKES_FILE,
  TO_THE_END,
} from "../protocol.ts";
import { openFolder } from "../storage.ts";
import { addToken } from "../tokens.ts";
import {
  HOME,
  isAlive,
  killHard,
  makeRoot,
  runClient,
  type Server,
  startServer,
  TEST_MS,
  temporaryFolder,
  waitFor,
  writeTree,
} from "./fixtures.ts";

setDefaultTimeout(TEST_MS);

// ---------------------------------------------------------------------------------------------------- keeper

/** All that it is told goes to the test, and all that the test says goes to the supervisor; a line of JSON each. */
const STAND_IN = `
import { connect } from "node:net";
import { createInterface } from "node:readline";
export function keep(settings) {
  for (const signal of ["SIGINT", "SIGTERM", "SIGHUP"]) process.on(signal, () => {});
  const socket = connect(Number(process.env.TEST_KEEPER_PORT), "127.0.0.1");
  socket.on("error", () => {});
  const tell = (told) => socket.write(JSON.stringify(told) + "\\n");
  tell({ settings, pid: process.pid });
  process.on("message", (message) => {
    tell({ message });
    if (message === "stop") process.exit(0);
  });
  process.on("disconnect", () => process.exit(0));
  createInterface({ input: socket }).on("line", (line) => process.send(JSON.parse(line)));
}
`;

/** A copy of the server with that keeper. */
const program = temporaryFolder();
const root = temporaryFolder();
beforeAll(() => {
  for (const name of readdirSync(HOME)) {
    if (/^[a-z0-9]+\.ts$|^package\.json$/.test(name)) copyFileSync(join(HOME, name), join(program.path, name));
  }
  writeFileSync(join(program.path, "keeper.ts"), STAND_IN);
  symlinkSync(join(HOME, "node_modules"), join(program.path, "node_modules"));
});
afterAll(() => {
  program[Symbol.dispose]();
  root[Symbol.dispose]();
});

interface Told {
  settings?: Record<string, unknown>;
  pid?: number;
  message?: ForKeeper | "drain" | "stop";
}

/** The keepers of one server, of which one is there at a time. */
interface Keepers extends Disposable {
  port: number;
  /** What each of them was told, in order. */
  told: Told[][];
  /** Messages of workers to the one that is there, of a kind. */
  of<K extends Said["kind"]>(kind: K): Extract<Said, { kind: K }>[];
  say(...messages: ("ready" | FromKeeper)[]): void;
}
type Said = Extract<ForKeeper, { message: unknown }>["message"] & { worker: number };

/** `isReady`: each says at once that it can be told. */
function startKeepers({ isReady = true } = {}): Keepers {
  const told: Told[][] = [];
  interface Said {
    rest: string;
    told: Told[];
    /** What the kernel has not taken yet. */
    unsent: Buffer;
  }
  let current: BunSocket<Said> | undefined;
  const flush = (socket: BunSocket<Said>) => {
    const { data } = socket;
    if (data.unsent.length > 0) data.unsent = data.unsent.subarray(Math.max(0, socket.write(data.unsent)));
  };
  const say = (...messages: ("ready" | FromKeeper)[]) => {
    const { data } = current!;
    const lines = messages.map((message) => Buffer.from(`${JSON.stringify(message)}\n`));
    data.unsent = Buffer.concat([data.unsent, ...lines]);
    flush(current!);
  };
  const listener = Bun.listen<Said>({
    hostname: "127.0.0.1",
    port: 0,
    socket: {
      open(socket) {
        socket.data = { rest: "", told: [], unsent: Buffer.alloc(0) };
        current = socket;
        told.push(socket.data.told);
        if (isReady) say("ready");
      },
      data(socket, bytes) {
        const lines = (socket.data.rest + new TextDecoder().decode(bytes)).split("\n");
        socket.data.rest = lines.pop()!;
        socket.data.told.push(...lines.map((line) => JSON.parse(line)));
      },
      drain: flush,
      error() {},
    },
  });
  const messages = () => (told.at(-1) ?? []).flatMap(({ message }) => (typeof message === "object" ? [message] : []));
  return {
    port: listener.port,
    told,
    of: (kind) =>
      messages()
        .flatMap((message) => ("message" in message ? [{ ...message.message, worker: message.worker }] : []))
        .filter((said) => said.kind === kind) as never,
    say,
    [Symbol.dispose]: () => listener.stop(true),
  };
}

async function startNode(path: string, keepers: Keepers, args: string[] = []): Promise<Server> {
  return startServer(path, {
    args,
    env: { TEST_KEEPER_PORT: String(keepers.port), REPRISE_TOKEN: "", REPRISE_CA: "" },
    program: [process.execPath, join(program.path, "server.ts")],
  });
}

const JOIN = ["--join", "127.0.0.1:1"];
const ALONE: ClusterState = { role: "alone", node: "me", revision: 0, replicas: [], secrets: [], holders: {} };
const MASTER: ClusterState = { ...ALONE, role: "master" };

/** Tells all workers, and returns when each has it: they are asked as often as it takes to have met both. */
async function tellAll(server: Server, keepers: Keepers, cluster: ClusterState, token = ""): Promise<void> {
  await waitFor("there is a keeper", () => keepers.told.length > 0);
  keepers.say({ worker: 0, cluster });
  const met = new Set<number>();
  await waitFor("every worker knows", async () => {
    using guest = await visit(server.port, { flags: DIRECT, token });
    const answer = await guest.ask({ action: "status" });
    if (answer.type !== "info") return false;
    const { worker, revision, role } = answer.info as { worker: number; revision: number; role: string };
    if (revision === cluster.revision && role === cluster.role) met.add(worker);
    return met.size === 2;
  });
}

// ---------------------------------------------------------------------------------------------------- guests

interface Guest extends Disposable {
  socket: Socket;
  /** All that came, WAIT apart. */
  answers: Answer[];
  waits(): number;
  closed(): boolean;
  ask(request: Request): Promise<Answer>;
  send(...requests: Request[]): void;
  /** The next answer that was not given out yet. */
  next(): Promise<Answer>;
}

interface Visit {
  flags?: number;
  token?: string;
  host?: string;
}

const ANSWERS = ["end", "error", "file", "info", "meta", "redirect", "link"];

/** Connects and says HELLO; the answer to that is the first of `answers`. */
async function visit(port: number, { flags = DIRECT, token = "", host = "127.0.0.1" }: Visit = {}): Promise<Guest> {
  const answers: Answer[] = [];
  const decoder = new FrameDecoder({ maxLength: MAX_ANSWER_BYTES });
  let isClosed = false;
  let waits = 0;
  let taken = 1;
  const socket = connect({ host, port });
  socket.on("data", (bytes: Buffer) => {
    decoder.push(new Uint8Array(bytes));
    for (let frame = decoder.next(); frame; frame = decoder.next()) {
      const answer = decodeAnswer(frame);
      if (answer.type === "wait") waits++;
      else answers.push(answer);
    }
  });
  socket.on("error", () => {});
  socket.on("close", () => {
    isClosed = true;
  });
  socket.write(encodeHello({ flags, token }));
  await waitFor("an answer to HELLO", () => answers.length > 0 || isClosed);
  const send = (...requests: Request[]) => void socket.write(Buffer.concat(requests.map(encodeRequest)));
  const next = async () => {
    const found = () => answers.slice(taken).find(({ type }) => ANSWERS.includes(type));
    const answer = await waitFor("an answer", () => found() ?? (isClosed ? "closed" : undefined));
    if (answer === "closed") throw new Error("The server has closed the connection");
    taken = answers.indexOf(answer) + 1;
    return answer;
  };
  return {
    socket,
    answers,
    waits: () => waits,
    closed: () => isClosed,
    send,
    next,
    ask(request) {
      send(request);
      return next();
    },
    [Symbol.dispose]: () => void socket.destroy(),
  };
}

/** What came of it, in a word. */
function brief(answer: Answer | undefined): string {
  if (answer?.type === "error") return answer.error.code;
  if (answer?.type === "redirect") return `${answer.host}:${answer.port}`;
  return answer?.type ?? "closed";
}

const get = (path: string, etag = ""): Request => ({ action: "get", path, offset: 0, length: TO_THE_END, etag });
const stat = (path: string): Request => ({ action: "stat", path });
const link = (message: Record<string, unknown> = { kind: "join" }): Request => ({ action: "link", message });
const put = (path: string, more: Partial<Put> = {}): Put => ({
  action: "put",
  path,
  id: "",
  offset: 0,
  size: 3,
  mtime: 1_000_000,
  noClobber: false,
  parents: false,
  etag: "",
  content: Buffer.from("new"),
  ...more,
});

function tokensFile(path: string): { path: string; readonly ann: string; readonly bob: string; readonly sub: string } {
  const file = join(path, "tokens.json");
  const add = (name: string, access: "write" | "replica", folder = "") => addToken(file, { name, access, folder });
  return { path: file, ann: add("ann", "write"), bob: add("bob", "replica"), sub: add("sub", "replica", "d") };
}

// ---------------------------------------------------------------------------------------------------- rotation

const member = (port: number, state: MemberStatus["state"] = "live") => ({
  node: `n${port}`,
  address: `127.0.0.1:${port}`,
  state,
  revision: 0,
  lag: 0,
});

describe("clients are sent on", () => {
  test("in exact rotation over all workers, each as often as the others (300 connections)", async () => {
    using keepers = startKeepers();
    using tree = makeRoot({ f: "1" });
    await using server = await startNode(tree.path, keepers, JOIN);
    const replicas = [member(1001), member(1002, "gone"), member(1003), member(1004)];
    await tellAll(server, keepers, { ...MASTER, replicas });
    const sentTo: string[] = [];
    for (let at = 0; at < 60; at++) {
      using guest = await visit(server.port, { flags: TAKES_FILE });
      sentTo.push(brief(guest.answers[0]));
      await waitFor("the server ends it", () => guest.closed());
    }
    const turns = ["127.0.0.1:1001", "127.0.0.1:1003", "127.0.0.1:1004"];
    expect(sentTo).toEqual(Array.from({ length: 60 }, (_, at) => turns[at % 3]!));
    for (let at = 0; at < 8; at++) {
      const guests = await Promise.all(Array.from({ length: 30 }, () => visit(server.port, { flags: 0 })));
      sentTo.push(...guests.map(({ answers }) => brief(answers[0])));
      for (const guest of guests) guest[Symbol.dispose]();
    }
    for (const address of turns) expect(sentTo.filter((to) => to === address)).toHaveLength(100);
    const lines = await waitFor("all is logged", () => {
      const found = server.log.filter(({ event }) => event === "redirect");
      return found.length === 300 ? found : undefined;
    });
    expect(new Set(lines.map(({ worker }) => worker))).toEqual(new Set([1, 2]));
    expect((lines as { to?: string }[]).filter(({ to }) => to === turns[0])).toHaveLength(100);
  });

  test("not who asks for this server, nor where nobody is live or the address is none", async () => {
    using keepers = startKeepers();
    using tree = makeRoot({ f: "1" });
    await using server = await startNode(tree.path, keepers, JOIN);
    const first = async (flags: number) => {
      using guest = await visit(server.port, { flags });
      return brief(guest.answers[0]);
    };
    expect(await first(0)).toBe("welcome");
    await tellAll(server, keepers, { ...MASTER, revision: 1, replicas: [member(1001)] });
    expect([await first(0), await first(DIRECT)]).toEqual(["127.0.0.1:1001", "welcome"]);
    await tellAll(server, keepers, { ...MASTER, revision: 2, replicas: [member(1001, "gone")] });
    expect(await first(0)).toBe("welcome");
    await tellAll(server, keepers, { ...MASTER, revision: 3, replicas: [{ ...member(1), address: "nowhere" }] });
    expect(await first(0)).toBe("welcome");
  });

  test("only who may come in, and no member", async () => {
    using keepers = startKeepers();
    using tree = makeRoot({ "d/f": "1" });
    const tokens = tokensFile(root.path);
    await using server = await startNode(tree.path, keepers, [...JOIN, "--tokens", tokens.path]);
    await tellAll(server, keepers, { ...MASTER, secrets: ["of-members"], replicas: [member(1001)] }, tokens.bob);
    const first = async (token: string) => {
      using guest = await visit(server.port, { flags: 0, token });
      return brief(guest.answers[0]);
    };
    expect(await first(tokens.ann)).toBe("127.0.0.1:1001");
    expect(await first(tokens.bob)).toBe("welcome");
    expect(await first("of-members")).toBe("welcome");
    expect(await first("guessed")).toBe("denied");
  });
});

test("Rotation.next() goes on with whom is left when one goes, and comes back to who returns", () => {
  const rotation = new Rotation();
  const [a, b, c] = [member(1), member(2), member(3)];
  const turns = (replicas: MemberStatus[]) => replicas.map(() => rotation.next({ replicas })?.address);
  expect(turns([a, b, c])).toEqual(["127.0.0.1:1", "127.0.0.1:2", "127.0.0.1:3"]);
  expect(rotation.next({ replicas: [{ ...a, state: "gone" }] })).toBeUndefined();
  expect(new Set(turns([a, { ...b, state: "gone" }, c]))).toEqual(new Set(["127.0.0.1:1", "127.0.0.1:3"]));
  expect(turns([a, b, c])).toHaveLength(3);
});

test("Rotation.next() among equals takes its own turn, as often as each of them", () => {
  const rotation = new Rotation();
  const replicas = [member(1), { ...member(2), isEqual: true }, { ...member(3, "joining"), isEqual: true }];
  const turns = Array.from({ length: 9 }, () => rotation.next({ replicas, takesTurn: true })?.address);
  expect(turns.slice(0, 3)).toEqual(["127.0.0.1:1", "127.0.0.1:2", undefined]);
  expect(turns.slice(3)).toEqual([...turns.slice(0, 3), ...turns.slice(0, 3)]);
});

test("addressOf() takes host and port, and nothing else", () => {
  expect(addressOf("a.example:80")).toEqual({ host: "a.example", port: 80 });
  expect(addressOf("[::1]:2121")).toEqual({ host: "::1", port: 2121 });
  for (const text of ["", "a", "a:0", "a:65536", ":80", "a b:1", "::1:80", "tcp://a:1", "a:1/"])
    expect(addressOf(text)).toBeUndefined();
});

// ---------------------------------------------------------------------------------------------------- links

describe("a link", () => {
  test("starts the keeper, and carries what both say until the keeper ends it", async () => {
    using keepers = startKeepers({ isReady: false });
    using tree = makeRoot({ f: "1" });
    await using server = await startNode(tree.path, keepers);
    expect(keepers.told).toHaveLength(0);
    using guest = await visit(server.port);
    guest.send(link({ kind: "join", n: 1 }), link({ n: 2 }), link({ n: 3 }));
    await waitFor("the keeper is started", () => keepers.told[0]?.[0]);
    expect(keepers.told[0]![0]!.settings).toMatchObject({ root: tree.path, host: "127.0.0.1", port: server.port });
    keepers.say("ready");
    await waitFor("it has heard all", () => keepers.of("said").length === 2);
    const [linked] = keepers.of("linked");
    expect(linked).toMatchObject({ peer: "127.0.0.1", message: { kind: "join", n: 1 } });
    expect(keepers.of("said").map(({ message }) => message)).toEqual([{ n: 2 }, { n: 3 }]);
    const { worker, id } = linked!;
    keepers.say({ worker, message: { kind: "say", id, text: '{"n":4}' } });
    keepers.say({ worker, message: { kind: "say", id, text: JSON.stringify({ text: "x".repeat(200_000) }) } });
    keepers.say({ worker, message: { kind: "unlink", id, code: "refused", text: "no such member" } });
    await waitFor("it is closed", () => guest.closed());
    const [, four, long, ending] = guest.answers;
    expect(four).toEqual({ type: "link", message: { n: 4 } });
    expect(long).toMatchObject({ message: { text: "x".repeat(200_000) } });
    expect(ending).toMatchObject({ type: "error", error: { code: "refused", message: "no such member" } });
    await waitFor("the keeper knows", () => keepers.of("unlinked").some((said) => said.id === id));
  });

  test("is nothing else", async () => {
    using keepers = startKeepers();
    using tree = makeRoot({ f: "1" });
    await using server = await startNode(tree.path, keepers);
    using guest = await visit(server.port);
    guest.send(link(), get("f"));
    expect(brief(await guest.next())).toBe("bad_frame");
    await waitFor("the keeper knows that it has ended", () => keepers.of("unlinked").length === 1);
  });

  test("ends with its peer, its worker, its keeper and its server", async () => {
    using keepers = startKeepers();
    using tree = makeRoot({ f: "1" });
    await using server = await startNode(tree.path, keepers);
    const begin = async () => {
      const count = keepers.of("linked").length;
      const guest = await visit(server.port);
      guest.send(link());
      const linked = await waitFor("the keeper has heard", () => keepers.of("linked")[count]);
      return { guest, linked };
    };
    const first = await begin();
    first.guest.socket.destroy();
    await waitFor("the peer has ended it", () => keepers.of("unlinked").some(({ id }) => id === first.linked.id));

    const second = await begin();
    for (const pid of server.workers()) {
      const parts = readFileSync(`/proc/${pid}/environ`, "utf8").split("\0");
      const settings = parts.find((part) => part.startsWith("REPRISE_WORKER="));
      if (settings && JSON.parse(settings.slice("REPRISE_WORKER=".length)).worker === second.linked.worker)
        killHard(pid);
    }
    const ended = () => keepers.told[0]!.some(({ message }) => typeof message === "object" && "ended" in message);
    await waitFor("the worker has ended", ended);
    await waitFor("the guest knows", () => second.guest.closed());

    const third = await begin();
    process.kill(keepers.told[0]![0]!.pid!, "SIGKILL");
    expect(brief(await third.guest.next())).toBe("busy");
    await waitFor("there is another keeper", () => keepers.told.length === 2);
    await waitFor("it is logged", () =>
      server.log.some(({ event, status }) => event === "keeper" && status === "restarted"),
    );
    // It never ends the server: more often than workers may die, and here it is still.
    for (let count = 2; count < 8; count++) {
      const { pid } = await waitFor("there is a keeper", () => keepers.told[count - 1]?.[0]);
      process.kill(pid!, "SIGKILL");
      await waitFor("there is another", () => keepers.told.length === count + 1);
    }
    await waitFor("it has its settings", () => keepers.told.at(-1)![0]);

    const fourth = await begin();
    server.process.kill("SIGTERM");
    expect(brief(await fourth.guest.next())).toBe("shutting_down");
    fourth.guest.socket.destroy();
    expect(await server.process.exited).toBe(0);
    const last = keepers.told.at(-1)!;
    const signals = () => last.flatMap(({ message }) => (typeof message === "string" ? [message] : []));
    await waitFor("all that it heard has come", () => signals().includes("stop"));
    expect(signals()).toEqual(["drain", "stop"]);
    expect(isAlive(last[0]!.pid!)).toBe(false);
  });

  test("whose peer does not read is not kept for it", async () => {
    using keepers = startKeepers();
    using tree = makeRoot({ f: "1" });
    await using server = await startNode(tree.path, keepers);
    using guest = await visit(server.port);
    guest.send(link());
    const { worker, id } = await waitFor("the keeper has heard", () => keepers.of("linked")[0]);
    guest.socket.pause();
    const text = JSON.stringify({ text: "x".repeat(400_000) });
    await waitFor("the keeper is told that it is over", () => {
      keepers.say({ worker, message: { kind: "say", id, text } });
      return keepers.of("unlinked").length > 0;
    });
    guest.socket.resume();
    await waitFor("it is closed", () => guest.closed());
  });

  test("takes a replica token of the whole root, or a member's", async () => {
    using keepers = startKeepers();
    using folder = temporaryFolder();
    using tree = makeRoot({ "d/f": "1" });
    const tokens = tokensFile(folder.path);
    await using server = await startNode(tree.path, keepers, ["--tokens", tokens.path, ...JOIN]);
    await tellAll(server, keepers, { ...MASTER, secrets: ["of-members"] }, tokens.bob);
    for (const token of [tokens.ann, tokens.sub]) {
      using guest = await visit(server.port, { token });
      expect(brief(await guest.ask(link()))).toBe("denied");
    }
    await waitFor(
      "both are logged",
      () => server.log.filter(({ event, status }) => `${event} ${status}` === "link denied").length === 2,
    );
    expect(keepers.of("linked")).toHaveLength(0);
    using bob = await visit(server.port, { token: tokens.bob });
    bob.send(link());
    await waitFor("the keeper has heard", () => keepers.of("linked").length === 1);
    // By what members know each other they may call, and not join.
    const call = link({ kind: "call", node: "a" });
    await waitFor("a member is let in", async () => {
      using guest = await visit(server.port, { token: "of-members" });
      if (brief(guest.answers[0]) !== "welcome") return false;
      guest.send(call);
      return waitFor("the keeper has heard", () => keepers.of("linked").length === 2);
    });
    using joining = await visit(server.port, { token: "of-members" });
    expect(brief(await joining.ask(link()))).toBe("denied");
    // A secret that is not one any more ends what stood on it.
    using other = await visit(server.port, { token: "of-members" });
    expect(brief(await other.ask({ action: "status" }))).toBe("info");
    keepers.say({ worker: 0, cluster: { ...MASTER, secrets: ["of others"] } });
    await waitFor(
      "it is no longer one",
      async () => other.closed() || brief(await other.ask({ action: "status" })) === "denied",
    );
  });

  test("without tokens is for this machine", async () => {
    const outside = Object.values(networkInterfaces())
      .flat()
      .find((found) => found && !found.internal && found.family === "IPv4")?.address;
    if (!outside) return console.log("skipped: this machine has no address but its own");
    using keepers = startKeepers();
    using tree = makeRoot({ f: "1" });
    await using server = await startNode(tree.path, keepers, ["--host", "0.0.0.0"]);
    using guest = await visit(server.port, { host: outside });
    const answer = await guest.ask(link());
    expect(answer).toMatchObject({ type: "error", error: { code: "refused" } });
    expect((answer as { error: Error }).error.message).toContain(
      "only servers on this machine may join without tokens",
    );
    expect(brief(await guest.ask(stat("f")))).toBe("meta");
    await waitFor("it is logged", () =>
      server.log.some(({ event, status }) => event === "link" && status === "refused"),
    );
    expect(keepers.told).toHaveLength(0);
  });
});

// ---------------------------------------------------------------------------------------------------- changes

describe("a change in a cluster", () => {
  test("is answered once all who are there know of it", async () => {
    using keepers = startKeepers();
    using folder = temporaryFolder();
    using tree = makeRoot({ "d/from": "1", old: "2" });
    const tokens = join(folder.path, "tokens.json");
    const token = addToken(tokens, { name: "ann", access: "write", folder: "d" });
    await using server = await startNode(tree.path, keepers, [...JOIN, "--writable", "--tokens", tokens]);
    // It is not known yet what there is: so it is waited for.
    using guest = await visit(server.port, { token });
    guest.send(
      put("a/b", { parents: true }),
      { action: "move", path: "from", to: "to", overwrite: false },
      { action: "mkdir", path: "new", parents: false },
      { action: "remove", path: "missing", recursive: false },
    );
    const { worker, id, paths } = await waitFor("it is announced", () => keepers.of("announce")[0]);
    expect(paths).toEqual(["d/a/b", "d/from", "d/to", "d/new"]);
    expect(existsSync(join(tree.path, "d", "a", "b"))).toBe(true);
    await waitFor("a WAIT comes in place of the answer", () => guest.waits() > 0);
    expect(guest.answers).toHaveLength(1);
    // What the keeper knows by then is the name of the version.
    using index = openIndex(tree.path);
    note(index, tree.path, "d/a/b", { digest: "ab".repeat(32) });
    keepers.say({ worker, message: { kind: "announced", id } });
    expect(await guest.next()).toMatchObject({ type: "meta", size: 3, etag: "ab".repeat(16) });
    expect([await guest.next(), await guest.next(), await guest.next()].map(brief)).toEqual([
      "end",
      "end",
      "not_found",
    ]);
    expect(brief(await guest.ask({ action: "remove", path: "missing", recursive: false }))).toBe("not_found");
    expect(keepers.of("announce")).toHaveLength(1);
  });

  test("is announced again to the next keeper, and ends with the server", async () => {
    using keepers = startKeepers();
    using tree = makeRoot({});
    await using server = await startNode(tree.path, keepers, [...JOIN, "--writable", "--grace", "1"]);
    await tellAll(server, keepers, MASTER);
    using guest = await visit(server.port);
    guest.send(put("f"));
    await waitFor("it is announced", () => keepers.of("announce")[0]);
    process.kill(keepers.told[0]![0]!.pid!, "SIGKILL");
    await waitFor("there is another keeper", () => keepers.told.length === 2);
    const { worker, id, paths } = await waitFor("it is announced again", () => keepers.of("announce")[0]);
    expect(paths).toEqual(["f"]);
    keepers.say({ worker, message: { kind: "announced", id } });
    expect(brief(await guest.next())).toBe("meta");
    guest.send(put("g"));
    await waitFor("the next is announced", () => keepers.of("announce")[1]);
    server.process.kill("SIGTERM");
    expect(brief(await guest.next())).toBe("shutting_down");
    guest.socket.destroy();
    expect(await server.process.exited).toBe(0);
  });

  test("whose client has gone keeps no place", async () => {
    using keepers = startKeepers();
    using tree = makeRoot({});
    await using server = await startNode(tree.path, keepers, [...JOIN, "--writable", "--workers", "1"]);
    using guest = await visit(server.port);
    guest.send(put("f"));
    await waitFor("it is announced", () => keepers.of("announce")[0]);
    guest.socket.destroy();
    using other = await visit(server.port);
    await waitFor("it is no longer there", async () => {
      const answer = await other.ask({ action: "status" });
      return answer.type === "info" && answer.info.connections === 1;
    });
    await waitFor("it is logged", () => server.log.some(({ event, status }) => event === "put" && status === "lost"));
  });

  test("of a server that is alone is announced to nobody", async () => {
    using keepers = startKeepers();
    using tree = makeRoot({});
    await using server = await startNode(tree.path, keepers, [...JOIN, "--writable"]);
    // Another revision than before it was told.
    await tellAll(server, keepers, { ...ALONE, revision: 1 });
    using guest = await visit(server.port);
    expect(brief(await guest.ask(put("f")))).toBe("meta");
    expect(keepers.of("announce")).toHaveLength(0);
  });
});

// ---------------------------------------------------------------------------------------------------- versions

function openIndex(path: string): Index & Disposable {
  mkdirSync(join(path, ".reprise"), { recursive: true });
  const index = new Index(join(path, ".reprise", "index.sqlite"));
  return Object.assign(index, { [Symbol.dispose]: () => index.close() });
}

/** Notes what is in the tree, and what is to be there instead. */
function note(
  index: Index,
  path: string,
  name: string,
  { digest, target }: { digest?: string; target?: LedgerRecord },
) {
  const folder = openFolder(path);
  const meta = folder.look(name);
  folder.close();
  const seen: Version = meta && digest ? { kind: "file", size: meta.size, mtime: meta.mtime, sha256: digest } : GONE;
  index.set({
    path: name,
    base: 1,
    known: seen,
    seen,
    etag: digest ? meta!.etag : "",
    sent: undefined,
    target,
    passed: [],
  });
}

const target = (path: string, more: Partial<LedgerRecord> = {}): LedgerRecord => ({
  path,
  kind: "file",
  size: 7,
  mtime: 5_000_000,
  sha256: "cd".repeat(32),
  revision: 9,
  origin: "n1001",
  over: "",
  ...more,
});
const HOLDERS = { n1001: "127.0.0.1:1001", "": "127.0.0.1:1000" };

describe("a version", () => {
  test("is named by its content where the index knows it, else by its file", async () => {
    using keepers = startKeepers();
    using tree = makeRoot({ f: "one", g: "two", "d/h": "three" });
    using index = openIndex(tree.path);
    const [f, h] = ["ab".repeat(32), "ef".repeat(32)];
    note(index, tree.path, "f", { digest: f });
    note(index, tree.path, "g", { digest: "99".repeat(32) });
    note(index, tree.path, "d/h", { digest: h });
    writeTree(tree.path, { g: "two!" });
    using folder = temporaryFolder();
    const tokens = join(folder.path, "tokens.json");
    const [all, below] = ["", "d"].map((at) => addToken(tokens, { name: `t${at}`, access: "write", folder: at }));
    await using server = await startNode(tree.path, keepers, [...JOIN, "--writable", "--tokens", tokens]);
    const local = (name: string) => {
      const opened = openFolder(tree.path);
      try {
        return opened.look(name)!.etag;
      } finally {
        opened.close();
      }
    };
    using guest = await visit(server.port, { flags: DIRECT | TAKES_FILE, token: all! });
    const etag = f.slice(0, 32);
    expect(await guest.ask(get("f"))).toMatchObject({ type: "file", etag });
    expect(await guest.ask(stat("f"))).toMatchObject({ type: "meta", etag });
    expect(await guest.ask(get("f", etag))).toMatchObject({ type: "meta", etag });
    expect(brief(await guest.next())).toBe("end");
    expect(brief(await guest.ask(get("f", local("f"))))).toBe("changed");
    expect(await guest.ask(stat("g"))).toMatchObject({ etag: local("g") });
    using other = await visit(server.port, { flags: DIRECT | TAKES_FILE, token: below! });
    expect(await other.ask(get("h"))).toMatchObject({ type: "file", etag: h.slice(0, 32) });
    // A put in place of that version, and of another.
    expect(brief(await other.ask(put("h", { etag: local("d/h") })))).toBe("changed");
    other.send(put("h", { etag: h.slice(0, 32) }));
    const { worker, id } = await waitFor("it is announced", () => keepers.of("announce")[0]);
    keepers.say({ worker, message: { kind: "announced", id } });
    expect(await other.next()).toMatchObject({ type: "meta", etag: local("d/h") });
  });

  test("that is elsewhere is asked for there", async () => {
    using keepers = startKeepers();
    using tree = makeRoot({ changed: "one", gone: "two", own: "three", far: "4" });
    using index = openIndex(tree.path);
    note(index, tree.path, "changed", { digest: "ab".repeat(32), target: target("changed") });
    note(index, tree.path, "gone", { digest: "22".repeat(32), target: target("gone", { ...GONE }) });
    note(index, tree.path, "own", { digest: "33".repeat(32), target: target("own", { origin: "me" }) });
    note(index, tree.path, "far", { target: target("far", { origin: "n7" }) });
    note(index, tree.path, "d", { target: target("d", { kind: "folder", size: 0, mtime: 0, sha256: "" }) });
    note(index, tree.path, "d/new", { target: target("d/new") });
    await using server = await startNode(tree.path, keepers, JOIN);
    await tellAll(server, keepers, { ...MASTER, holders: HOLDERS });
    using guest = await visit(server.port, { flags: DIRECT | TAKES_FILE });
    const asked = async (request: Request) => brief(await guest.ask(request));
    expect(await asked(get("changed"))).toBe("127.0.0.1:1001");
    expect(await asked(stat("changed"))).toBe("127.0.0.1:1001");
    expect(await asked(get("changed", "cd".repeat(16)))).toBe("127.0.0.1:1001");
    expect(await asked(get("d/new"))).toBe("127.0.0.1:1001");
    expect(await asked(stat("d"))).toBe("127.0.0.1:1001");
    expect(await asked(get("far"))).toBe("127.0.0.1:1000");
    expect([await asked(get("gone")), await asked(stat("gone"))]).toEqual(["not_found", "not_found"]);
    expect([await asked(get("own")), brief(await guest.next())]).toEqual(["meta", "end"]);
    // A member that wants just what is here.
    expect(await guest.ask(get("changed", "ab".repeat(16)))).toMatchObject({ type: "meta", size: 3 });
    expect(brief(await guest.next())).toBe("end");
    await waitFor(
      "it is logged",
      () => (server.log as { to?: string }[]).filter(({ to }) => to === HOLDERS.n1001).length >= 5,
    );
    // Nobody is known who has it.
    await tellAll(server, keepers, { ...MASTER, revision: 1 });
    expect([await asked(get("changed")), brief(await guest.next())]).toEqual(["meta", "end"]);
    expect(await asked(get("d/new"))).toBe("not_found");
  });

  test("that is elsewhere is in the list, and what is gone is not", async () => {
    using keepers = startKeepers();
    using tree = makeRoot({ changed: "one", gone: "two", same: "three", "d/old": "4", "d/deep/x": "5" });
    using index = openIndex(tree.path);
    note(index, tree.path, "changed", { digest: "ab".repeat(32), target: target("changed") });
    note(index, tree.path, "gone", { digest: "22".repeat(32), target: target("gone", { ...GONE }) });
    note(index, tree.path, "d/new", { target: target("d/new") });
    note(index, tree.path, "d/old", { digest: "44".repeat(32), target: target("d/old", { ...GONE }) });
    note(index, tree.path, "d/.reprise-x", { target: target("d/.reprise-x") });
    note(index, tree.path, "e", { target: target("e", { kind: "folder", size: 0, mtime: 0, sha256: "" }) });
    note(index, tree.path, "e/f", { target: target("e/f") });
    await using server = await startNode(tree.path, keepers, JOIN);
    await tellAll(server, keepers, { ...MASTER, holders: HOLDERS });
    using guest = await visit(server.port);
    const listOf = async (path: string, recursive: boolean) => {
      const from = guest.answers.length;
      const last = await guest.ask({ action: "list", path, recursive });
      const entries = guest.answers.slice(from).flatMap((answer) => (answer.type === "entries" ? answer.entries : []));
      if (last.type === "end") expect(last.count).toBe(entries.length);
      return last.type === "end" ? entries.map(({ path, size }) => `${path} ${size}`).sort() : brief(last);
    };
    expect(await listOf("", false)).toEqual(["changed 7", "d 0", "e 0", "same 5"]);
    expect(await listOf("d", false)).toEqual(["deep 0", "new 7"]);
    expect(await listOf("", true)).toEqual([
      "changed 7",
      "d 0",
      "d/deep 0",
      "d/deep/x 1",
      "d/new 7",
      "e 0",
      "e/f 7",
      "same 5",
    ]);
    expect(await listOf("e", true)).toEqual(["f 7"]);
    expect(await listOf("nowhere", true)).toBe("not_found");
    expect(await listOf("same", true)).toBe("not_a_folder");
    await tellAll(server, keepers, { ...ALONE, revision: 1 });
    expect(await listOf("", false)).toEqual(["changed 3", "d 0", "gone 3", "same 5"]);
  });

  test("has its file's name where the index cannot be read, which is said once", async () => {
    using keepers = startKeepers();
    using tree = makeRoot({ f: "one" });
    mkdirSync(join(tree.path, ".reprise"));
    writeFileSync(join(tree.path, ".reprise", "index.sqlite"), "no database at all".repeat(100));
    await using server = await startNode(tree.path, keepers, [...JOIN, "--workers", "1"]);
    using guest = await visit(server.port, { flags: DIRECT | TAKES_FILE });
    for (let at = 0; at < 20; at++) expect(brief(await guest.ask(get("f")))).toBe("file");
    expect(brief(await guest.ask(stat("f")))).toBe("meta");
    await waitFor("it is logged", () => server.log.some(({ event }) => event === "bug"));
    expect(server.log.filter(({ event }) => event === "bug")).toHaveLength(1);
  });
});

test("Versions.of() says once that the index cannot be read, and reads it again when it can", () => {
  using tree = makeRoot({ f: "one" });
  mkdirSync(join(tree.path, ".reprise"));
  const file = join(tree.path, ".reprise", "index.sqlite");
  const failures: unknown[] = [];
  const versions = new Versions(
    file,
    () => true,
    (error) => failures.push(error),
    0,
  );
  expect(versions.of("f", "local")).toBe("local");
  expect(failures).toHaveLength(0);
  for (let round = 1; round <= 2; round++) {
    writeFileSync(file, "no database at all".repeat(100));
    for (let at = 0; at < 5; at++) expect(versions.of("f", "local")).toBe("local");
    expect(failures).toHaveLength(round);
    rmSync(file);
    using index = openIndex(tree.path);
    note(index, tree.path, "f", { digest: "ab".repeat(32) });
    expect(versions.of("f", index.get("f")!.etag)).toBe("ab".repeat(16));
    expect(versions.of("f", "other")).toBe("other");
    versions.reopen();
  }
});

test("withTargets() goes on as it was where nothing is elsewhere, and adds in order", async () => {
  const entry = (path: string): Entry => ({ kind: "file", size: 1, mtime: 0, path });
  async function* given() {
    yield [entry("a"), entry("b")];
    yield [entry("c")];
  }
  const found: string[][] = [];
  const targets = new Map(
    [target("z/y"), target("z", { kind: "folder" }), target("b", { ...GONE })].map((one) => [one.path, one]),
  );
  for await (const entries of withTargets(given(), targets, true)) found.push(entries.map(({ path }) => path));
  expect(found).toEqual([["a"], ["c"], ["z", "z/y"]]);
});

test("sweep() leaves the index and the ledger alone", async () => {
  using tree = makeRoot({});
  const changes = openChanges(tree.path);
  const own = ["index.sqlite", "index.sqlite-wal", "index.sqlite-shm", "ledger.sqlite", "ledger.sqlite-wal"];
  for (const name of own) new Database(join(tree.path, ".reprise", name), { create: true }).close();
  for (const name of own) writeFileSync(join(tree.path, ".reprise", name), "");
  await changes.sweep(Date.now() + 365 * 24 * 3600 * 1000);
  changes.close();
  expect(
    readdirSync(join(tree.path, ".reprise"))
      .filter((name) => name.includes("sqlite"))
      .sort(),
  ).toEqual(own.sort());
});

// ---------------------------------------------------------------------------------------------------- status, options

test("STATUS says what the cluster is", async () => {
  using keepers = startKeepers();
  using tree = makeRoot({});
  await using server = await startNode(tree.path, keepers, JOIN);
  const statusOf = async () => {
    using guest = await visit(server.port);
    const answer = await guest.ask({ action: "status" });
    return answer.type === "info" ? answer.info : {};
  };
  const alone = await statusOf();
  expect(alone).toMatchObject({ role: "alone", replicas: [] });
  expect(Object.keys(alone)).not.toContain("node");
  const replicas = [{ ...member(1001), lag: 3, problem: "no room" }];
  const cluster = {
    ...MASTER,
    role: "replica" as const,
    master: "127.0.0.1:1",
    problem: "late",
    revision: 8,
    replicas,
  };
  await tellAll(server, keepers, { ...cluster, secrets: ["hidden"], holders: HOLDERS });
  const info = await statusOf();
  expect(info).toMatchObject({
    role: "replica",
    node: "me",
    master: "127.0.0.1:1",
    problem: "late",
    revision: 8,
    replicas,
  });
  expect(JSON.stringify(info)).not.toContain("hidden");
  // A worker that is started later knows it too.
  for (const pid of server.workers()) if (pid !== keepers.told[0]![0]!.pid) killHard(pid);
  await waitFor(
    "workers are there again",
    async () => (await statusOf().catch(() => ({ role: "" }))).role === "replica",
  );
});

test("the keeper is told how to join", async () => {
  using keepers = startKeepers();
  using tree = makeRoot({});
  using folder = temporaryFolder();
  const file = join(folder.path, "token");
  writeFileSync(file, "rprs_secret\n", { mode: 0o600 });
  const args = [
    "--join",
    "tls://A.example",
    "--advertise",
    "[2001:db8::1]:99",
    "--token-file",
    file,
    "--keep-free",
    "1M",
  ];
  await using server = await startNode(tree.path, keepers, args);
  const [told] = await waitFor("there is a keeper", () => keepers.told[0]?.[0] && keepers.told[0]);
  expect(told!.settings).toEqual({
    root: tree.path,
    redirectOnly: false,
    host: "127.0.0.1",
    port: server.port,
    tls: false,
    join: "tls://a.example:2121",
    advertise: "[2001:db8::1]:99",
    token: "rprs_secret",
    keepFree: 1024 * 1024,
    log: "json",
  });
  for (const pid of server.workers().filter((pid) => pid !== told!.pid))
    expect(readFileSync(`/proc/${pid}/environ`, "utf8")).not.toContain("rprs_secret");
});

test("a server that has a ledger starts its keeper by itself", async () => {
  using keepers = startKeepers();
  using tree = makeRoot({});
  mkdirSync(join(tree.path, ".reprise"));
  writeFileSync(join(tree.path, ".reprise", "ledger.sqlite"), "");
  await using server = await startNode(tree.path, keepers);
  await waitFor("there is a keeper", () => keepers.told[0]?.[0]);
  expect(await server.stop("SIGINT")).toBe(0);
});

describe("a server is not started with", () => {
  for (const args of [
    ["--join", ""],
    ["--join", "a:0"],
    ["--join", "a:1,b:2"],
    ["--join", "0.0.0.0:2121"],
    ["--join", "http://a:1"],
    ["--advertise", "0.0.0.0:2121"],
    ["--advertise", "[::]:2121"],
    ["--advertise", "a"],
    ["--advertise", "a:0"],
    ["--advertise", "a:70000"],
    ["--advertise", "tls://a:1"],
    ["--advertise", "a b:1"],
    ["--token-file", "some"],
  ]) {
    test(args.join(" "), async () => {
      const child = Bun.spawn({
        cmd: [process.execPath, join(HOME, "server.ts"), root.path, "--port", "0", ...args],
        stdio: ["ignore", "pipe", "pipe"],
      });
      const errors = await new Response(child.stderr).text();
      expect({ status: await child.exited, named: errors.includes(args[0]!) }).toEqual({ status: 2, named: true });
    });
  }
});

test("a client of a server in a cluster of one is served as ever", async () => {
  using keepers = startKeepers();
  using tree = makeRoot({ f: "content" });
  await using server = await startNode(tree.path, keepers, JOIN);
  const run = await runClient(server.address, ["get", "f", "-o", "-"]);
  expect([run.status, run.output]).toEqual([0, "content"]);
});
