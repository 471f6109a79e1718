/** Every kind of transfer over a wire that cuts, damages, stalls and delays: identical in the end, or loud. */
import { describe, expect, setDefaultTimeout, test } from "bun:test";
import { existsSync, readdirSync, readFileSync } from "node:fs";
import { join } from "node:path";
import { ExitStatus, MAX_CONTENT_BYTES } from "../../protocol.ts";
import {
  type ClientRun,
  connectRaw,
  type LogLine,
  makeRoot,
  randomBytes,
  runClient,
  type Server,
  seeded,
  startServer,
  TEST_MS,
  temporaryFolder,
  waitFor,
  writeTree,
} from "../fixtures.ts";
import { type Direction, type Faults, startProxy } from "./proxy.ts";

setDefaultTimeout(TEST_MS);

const SEED = Number(process.env.SEED ?? 20_261_122);
const SIZE = 3_000_000;
const BIG = randomBytes(SIZE);
const TREE = {
  ...Object.fromEntries(
    Array.from({ length: 40 }, (_, index) => [`d${index % 4}/f${index}`, randomBytes(4_000, index + 1)]),
  ),
  big: randomBytes(900_000, 99),
};

// ---------------------------------------------------------------------------------------------------- the proxy itself

/** A server that says `says` to whoever comes, keeps what it hears, and says more once the other side has ended. */
function startTalker(says: Uint8Array) {
  const heard: Uint8Array[] = [];
  const listener = Bun.listen({
    hostname: "127.0.0.1",
    port: 0,
    allowHalfOpen: true,
    socket: {
      open: (socket) => void socket.write(says),
      data: (_, bytes) => void heard.push(bytes),
      end(socket) {
        socket.write("goodbye");
        socket.shutdown();
      },
    },
  });
  const heardBytes = () => Buffer.concat(heard);
  return { port: listener.port, heard: heardBytes, [Symbol.dispose]: () => listener.stop(true) };
}

describe("the proxy", () => {
  const says = randomBytes(10_000);

  test("passes everything, also behind the end of the other direction", async () => {
    using server = startTalker(says);
    using proxy = startProxy({ target: server.port, spoil: () => ({ toClient: { delay_ms: 5 } }) });
    using connection = await connectRaw(proxy.port);
    connection.socket.write("hello");
    connection.socket.shutdown();
    await waitFor("the server has ended too", () => connection.received().length >= says.length + 7);
    expect(connection.received()).toEqual(Buffer.concat([says, Buffer.from("goodbye")]));
    expect(server.heard().toString()).toBe("hello");
    expect([proxy.connections, proxy.sent("toServer"), proxy.sent("toClient")]).toEqual([1, [5], [10_007]]);
  });

  test("cuts behind a byte", async () => {
    using server = startTalker(says);
    using proxy = startProxy({ target: server.port, spoil: () => ({ toClient: { cutAt: 4_321 } }) });
    using connection = await connectRaw(proxy.port);
    await waitFor("it is cut", () => connection.closed());
    expect(connection.received()).toEqual(Buffer.from(says.subarray(0, 4_321)));
  });

  test("flips one bit, on the connections that are meant", async () => {
    using server = startTalker(says);
    const spoil = (connection: number): { toClient?: Faults } =>
      connection === 2 ? { toClient: { flipAt: 7_003 } } : {};
    using proxy = startProxy({ target: server.port, spoil });
    using first = await connectRaw(proxy.port);
    using second = await connectRaw(proxy.port);
    const isAll = () => [first, second].every((connection) => connection.received().length === says.length);
    await waitFor("all has come", isAll);
    expect(first.received()).toEqual(Buffer.from(says));
    const wrong = [...second.received()].flatMap((byte, at) => (byte === says[at] ? [] : [[at, byte ^ says[at]!]]));
    expect(wrong).toEqual([[7_003, 1 << (7_003 % 8)]]);
  });

  test("stalls behind a byte in one direction, while the other goes on", async () => {
    using server = startTalker(says);
    using proxy = startProxy({ target: server.port, spoil: () => ({ toClient: { stallAt: 100 } }) });
    using connection = await connectRaw(proxy.port);
    connection.socket.write("hello");
    await waitFor("the server hears", () => server.heard().toString() === "hello");
    await waitFor("the proxy has taken all", () => proxy.sent("toClient")[0] === says.length);
    await waitFor("what passes has come", () => connection.received().length >= 100);
    expect([connection.received().length, connection.closed()]).toEqual([100, false]);
  });

  test("to where nobody listens closes", async () => {
    using gone = startTalker(says);
    using proxy = startProxy({ target: gone.port });
    gone[Symbol.dispose]();
    using connection = await connectRaw(proxy.port);
    await waitFor("it is closed", () => connection.closed());
  });
});

// ---------------------------------------------------------------------------------------------------- transfers

interface Transfer {
  name: string;
  /** Where the content goes. */
  direction: Direction;
  /** Large content is not sent twice; of a folder only the client knows what was whole. */
  isOneFile: boolean;
  run(it: Place, round: string, address: string, limits?: string[]): Promise<ClientRun>;
  /** Throws if what is under the final name is not right; false if nothing is there. */
  check(it: Place, round: string, run: ClientRun): boolean;
}

interface Place {
  server: Server;
  root: string;
  folder: string;
}

/** For what stalls, and for what may, since a length that was flipped has a side wait: longer than a byte takes. */
const STALLED = ["--timeout", "1.5"];
const MAY_STALL = ["--timeout", "5"];

function isBig(file: string): boolean {
  if (!existsSync(file)) return false;
  expect(Buffer.compare(readFileSync(file), BIG)).toBe(0);
  return true;
}

/** Files that are there are whole; true if all of them are. */
function isTree(folder: string): boolean {
  if (!existsSync(folder)) return false;
  const names = Object.keys(TREE) as (keyof typeof TREE)[];
  const there = names.filter((name) => existsSync(join(folder, name)));
  for (const name of there) expect(Buffer.compare(readFileSync(join(folder, name)), TREE[name]!)).toBe(0);
  return there.length === names.length;
}

const transfers: Transfer[] = [
  {
    name: "get",
    direction: "toClient",
    isOneFile: true,
    run: (it, round, address, limits = []) =>
      runClient(address, ["get", "big", "-o", join(it.folder, round), ...limits]),
    check: (it, round) => isBig(join(it.folder, round)),
  },
  {
    name: "cat",
    direction: "toClient",
    isOneFile: true,
    run: (_, __, address, limits = []) => runClient(address, ["cat", "big", ...limits]),
    check(_, __, { stdout }) {
      expect(Buffer.compare(stdout, BIG.subarray(0, stdout.length))).toBe(0);
      return stdout.length === SIZE;
    },
  },
  {
    name: "get -r",
    direction: "toClient",
    isOneFile: false,
    run: (it, round, address, limits = []) =>
      runClient(address, ["get", "-r", "tree", "-o", join(it.folder, round), ...limits]),
    check: (it, round) => isTree(join(it.folder, round)),
  },
  {
    name: "put",
    direction: "toServer",
    isOneFile: true,
    run: (it, round, address, limits = []) =>
      runClient(address, ["put", join(it.folder, "big"), "-t", round, "-d", join(it.folder, "logs", round), ...limits]),
    check: (it, round) => isBig(join(it.root, round)),
  },
  {
    name: "put -",
    direction: "toServer",
    isOneFile: true,
    run: (_, round, address, limits = []) => runClient(address, ["put", "-", "-t", round, ...limits], { stdin: BIG }),
    check: (it, round) => isBig(join(it.root, round)),
  },
  {
    name: "put -r",
    direction: "toServer",
    isOneFile: false,
    run: (it, round, address, limits = []) =>
      runClient(address, [
        "put",
        "-r",
        join(it.folder, "tree"),
        "-t",
        round,
        "-d",
        join(it.folder, "logs", round),
        ...limits,
      ]),
    check: (it, round) => isTree(join(it.root, round)),
  },
];

const directions: Direction[] = ["toClient", "toServer"];
/** What a damaged wire may end in after one attempt: never a local error, nor a wrong name. */
const LOUD: number[] = [ExitStatus.checksum, ExitStatus.lost, ExitStatus.server];

/** Bytes that may come again: a frame, of which some had come, and what was said around it. */
const AGAIN_BYTES = MAX_CONTENT_BYTES + 1_024;

describe("one fault at a seeded place", () => {
  test.each(transfers)("$name: identical or loud, and nothing is sent twice", async (transfer) => {
    using root = makeRoot({ big: BIG });
    using folder = makeRoot({ big: BIG });
    for (const path of [root.path, folder.path]) writeTree(join(path, "tree"), TREE);
    await using server = await startServer(root.path, { args: ["--writable"] });
    const it = { server, root: root.path, folder: folder.path };
    const total = await measure(it, transfer);
    const random = seeded(SEED);
    const rounds = directions.flatMap((direction) =>
      (["cutAt", "flipAt", "stallAt"] as const).flatMap((kind) =>
        // The first bytes, anywhere, and the end.
        [random(60), random(total[direction]), random(total[direction]), total[direction] - 1 - random(20)].map(
          (at) => ({ direction, faults: { [kind]: at } as Faults, at }),
        ),
      ),
    );
    // Several at a time, since those that stall do nothing.
    const waiting = [...rounds.entries()];
    const work = async () => {
      for (let next = waiting.shift(); next; next = waiting.shift()) {
        const [index, { direction, faults, at }] = next;
        await transferOnce(it, transfer, `r${index}`, { direction, faults, at, total });
      }
    };
    await Promise.all([work(), work(), work(), work(), work(), work()]);
    expect(temporariesIn(folder.path)).toEqual([]);
  });

  test.each(transfers)("$name: every byte 20 ms later", async (transfer) => {
    using root = makeRoot({ big: BIG });
    using folder = makeRoot({ big: BIG });
    for (const path of [root.path, folder.path]) writeTree(join(path, "tree"), TREE);
    await using server = await startServer(root.path, { args: ["--writable"] });
    const later = { delay_ms: 20 };
    using proxy = startProxy({ target: server.port, spoil: () => ({ toClient: later, toServer: later }) });
    const it = { server, root: root.path, folder: folder.path };
    const run = await transfer.run(it, "r", proxy.address);
    expect([run.status, transfer.check(it, "r", run)]).toEqual([0, true]);
  });
});

describe("faults that come again", () => {
  const gets = ({ server }: Place) => server.log.filter((line) => line.event === "get");

  async function setUp(): Promise<Place & AsyncDisposable> {
    const root = makeRoot({ big: BIG, small: "0123456789" });
    const folder = makeRoot({});
    const server = await startServer(root.path);
    return {
      server,
      root: root.path,
      folder: folder.path,
      async [Symbol.asyncDispose]() {
        await server[Symbol.asyncDispose]();
        root[Symbol.dispose]();
        folder[Symbol.dispose]();
      },
    };
  }
  const get = (it: Place, address: string, ...args: string[]) =>
    runClient(address, ["get", "big", "-d", it.folder, ...args]);

  test("one flipped bit in a chunk: said, and asked for once more", async () => {
    await using it = await setUp();
    const spoil = (connection: number) => (connection === 1 ? { toClient: { flipAt: 2_000_000 } } : {});
    using proxy = startProxy({ target: it.server.port, spoil });
    const run = await get(it, proxy.address);
    expect(run.status).toBe(0);
    expect(run.errors).toContain("damaged on the way");
    await it.server.stop("SIGINT");
    expect(gets(it).length).toBe(2);
    expect(isBig(join(it.folder, "big"))).toBe(true);
  });

  test("damage that stays: status 6, and what was right is kept", async () => {
    await using it = await setUp();
    using proxy = startProxy({ target: it.server.port, spoil: () => ({ toClient: { flipAt: 20_000 } }) });
    expect((await get(it, proxy.address, "--retries", "2")).status).toBe(ExitStatus.checksum);
    expect(existsSync(join(it.folder, "big"))).toBe(false);
    expect((await get(it, it.server.address)).status).toBe(0);
    expect(isBig(join(it.folder, "big"))).toBe(true);
  });

  test("cut again and again at growing distances: goes on each time where it was", async () => {
    await using it = await setUp();
    const spoil = (connection: number) => ({ toClient: { cutAt: connection * 700_000 } });
    using proxy = startProxy({ target: it.server.port, spoil });
    expect((await get(it, proxy.address)).status).toBe(0);
    await it.server.stop("SIGINT");
    // In the order of their beginnings; that of the lines is up to the workers.
    const begun = ({ time, ms }: LogLine) => Date.parse(time!) - ms!;
    const offsets = gets(it)
      .toSorted((a, b) => begun(a) - begun(b))
      .map((line) => line.offset!);
    expect(offsets.length).toBeGreaterThan(2);
    expect(offsets).toEqual([...new Set(offsets)].sort((a, b) => a - b));
    expect(isBig(join(it.folder, "big"))).toBe(true);
  });

  test("cut at every byte of the handshake and the first frames: status 8 or whole, never less", async () => {
    await using it = await setUp();
    for (let cutAt = 0; cutAt < 160; cutAt += 7) {
      using proxy = startProxy({ target: it.server.port, spoil: () => ({ toClient: { cutAt } }) });
      using folder = temporaryFolder();
      const run = await runClient(proxy.address, ["get", "small", "-d", folder.path, "--retries", "0"]);
      const file = join(folder.path, "small");
      const whole = existsSync(file);
      expect([cutAt, run.status]).toEqual([cutAt, whole ? 0 : ExitStatus.lost]);
      if (whole) expect(readFileSync(file, "utf8")).toBe("0123456789");
    }
  });

  test("a stall in mid-file ends by --timeout, which is said, and the next attempt goes on", async () => {
    await using it = await setUp();
    const spoil = (connection: number) => (connection === 1 ? { toClient: { stallAt: 2_000_000 } } : {});
    using proxy = startProxy({ target: it.server.port, spoil });
    const run = await get(it, proxy.address, "--timeout", "2");
    expect(run.status).toBe(0);
    expect(run.errors).toContain("no byte for 2 s; trying again");
    expect(isBig(join(it.folder, "big"))).toBe(true);
  });

  test("an upload that stalls behind its last byte is not kept waiting by the server", async () => {
    using root = makeRoot({});
    using folder = makeRoot({ big: BIG });
    // Longer than the test may take.
    await using server = await startServer(root.path, { args: ["--writable", "--idle-timeout", "600"] });
    const spoil = (connection: number) => (connection === 1 ? { toServer: { stallAt: 2_000_000 } } : {});
    using proxy = startProxy({ target: server.port, spoil });
    // Longer than the server takes to say WAIT.
    const args = ["put", "-", "-t", "big", "--timeout", "2"];
    const run = await runClient(proxy.address, args, { stdin: readFileSync(join(folder.path, "big")) });
    expect(run.status).toBe(0);
    expect(isBig(join(root.path, "big"))).toBe(true);
  });
});

/** The most that a connection sends in either direction when nothing befalls it. */
async function measure(it: Place, transfer: Transfer): Promise<Record<Direction, number>> {
  using proxy = startProxy({ target: it.server.port });
  const run = await transfer.run(it, "whole", proxy.address);
  expect([run.status, run.errors.trim(), transfer.check(it, "whole", run)]).toEqual([0, expect.any(String), true]);
  return { toClient: Math.max(...proxy.sent("toClient")), toServer: Math.max(...proxy.sent("toServer")) };
}

async function transferOnce(
  it: Place,
  transfer: Transfer,
  round: string,
  fault: { direction: Direction; faults: Faults; at: number; total: Record<Direction, number> },
): Promise<void> {
  const { direction, faults, at, total } = fault;
  using proxy = startProxy({
    target: it.server.port,
    spoil: (connection) => (connection === 1 ? { [direction]: faults } : {}),
  });
  const limits = faults.stallAt === undefined ? MAY_STALL : STALLED;
  const run = await transfer.run(it, round, proxy.address, limits);
  const isThere = transfer.check(it, round, run);
  const what = [transfer.name, direction, faults];
  if (run.status !== 0) {
    // Only damage of the first frames may look like another protocol, which is not tried again.
    expect([...what, faults.flipAt !== undefined, LOUD.includes(run.status), run.errors !== ""]).toEqual([
      ...what,
      true,
      true,
      true,
    ]);
    const again = await transfer.run(it, round, it.server.address);
    expect([...what, again.status, transfer.check(it, round, again)]).toEqual([...what, 0, true]);
    return;
  }
  expect([...what, isThere]).toEqual([...what, true]);
  const [, second] = proxy.sent(direction);
  if (!transfer.isOneFile || direction !== transfer.direction || second === undefined) return;
  // The other side of an upload may still be taking in what had come when it is asked how much that is: where it
  // was told to go on is in its log.
  const [first = 0] = proxy.sent(direction);
  const held = direction === "toClient" ? Math.min(at, first) : await heldWhenAsked(it, round);
  const most = total[direction] - held + AGAIN_BYTES;
  expect([...what, second <= most || second]).toEqual([...what, true]);
}

/**
 * How much the server held of an upload when it was to go on the first time; later ones, after an answer that the one before
 * is still being taken in, begin further on.
 */
async function heldWhenAsked({ server }: Place, path: string): Promise<number> {
  const puts = () => server.log.filter((line) => line.event === "put" && line.path === path);
  await waitFor("the upload's end is logged", () => puts().some(({ status }) => status === "ok"));
  const [, second = 0] = puts()
    .map(({ offset }) => offset!)
    .sort((a, b) => a - b);
  return second;
}

/** What unfinished transfers have left. */
function temporariesIn(folder: string): string[] {
  const names = readdirSync(folder, { recursive: true }).map(String);
  return names.filter((name) => /\.part|\.resume\.json|\.lock|(^|\/)\.reprise-/.test(name));
}
