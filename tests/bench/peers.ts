/**
 * Peers that no server likes, for the benches: some that only stay, some that send or read hardly anything, and a flood.
 *
 * ```sh
 * bun tests/bench/peers.ts 2121 '{"greeted": 1000}'       # at port 2121; ends when its standard input does
 * ```
 *
 * A process of its own, so that they take no time from the bench. Each line of standard input is an order: how many of a
 * kind there shall be, or for how long to flood. A line of standard output answers it, when they are all there or the
 * flood is over.
 */
import type { Socket } from "bun";
import { encodeHello, encodeRequest, TO_THE_END } from "../../protocol.ts";

/**
 * `connected` says nothing, `greeted` nothing after its WELCOME; `trickling` sends a byte of a request each second;
 * `deaf` asks for the file `large` and never reads. One that is cut comes again.
 */
export type Kind = "connected" | "greeted" | "trickling" | "deaf";
export type Order = Partial<Record<Kind, number>> & { floodMs?: number };
/** What a flood came to. */
export interface Flood {
  connections: number;
  /** When it ended: Date.now(). */
  endedAt: number;
}

/** Connections of a flood that are being made at a time. */
const FLOOD_WIDTH = 256;
const BATCH = 100;
const TRICKLE_MS = 1000;
/** Before coming again. */
const AGAIN_MS = 100;

const get = (path: string) => encodeRequest({ action: "get", path, offset: 0, length: TO_THE_END, etag: "" });
/** Long enough for an hour of trickling. */
const REQUEST = get("x".repeat(200).concat("/").repeat(18));

interface State {
  there(): void;
  sent: number;
}

export interface Peers extends AsyncDisposable {
  order(order: Order): Promise<Flood>;
}

/** Peers of the server at `port`, as a process; they are gone when it goes out of scope. */
export function startPeers(port: number): Peers {
  const child = Bun.spawn([process.execPath, import.meta.path, String(port)], { stdio: ["pipe", "pipe", "inherit"] });
  const answers = child.stdout.getReader();
  return {
    async order(order) {
      child.stdin.write(`${JSON.stringify(order)}\n`);
      await child.stdin.flush();
      const { value } = await answers.read();
      if (!value) throw new Error("The peers have ended");
      return JSON.parse(new TextDecoder().decode(value));
    },
    async [Symbol.asyncDispose]() {
      child.kill("SIGKILL");
      await child.exited;
    },
  };
}

/** Resolves when it is as its kind says. */
function add(kind: Kind, port: number): Promise<void> {
  const { promise, resolve } = Promise.withResolvers<void>();
  const again = () => void setTimeout(() => Bun.connect(options).catch(again), AGAIN_MS);
  const options: Bun.TCPSocketConnectOptions<State> = {
    hostname: "127.0.0.1",
    port,
    data: { there: resolve, sent: 0 },
    socket: { open: (socket) => begin(kind, socket), data: (socket) => socket.data.there(), close: again },
  };
  Bun.connect(options).catch(again);
  return promise;
}

function begin(kind: Kind, socket: Socket<State>): void {
  if (kind !== "connected") socket.write(encodeHello());
  if (kind === "connected") socket.data.there();
  else if (kind === "trickling") trickling.add(socket);
  else if (kind === "deaf") {
    socket.write(get("large"));
    socket.pause();
    socket.data.there();
  }
}

const trickling = new Set<Socket<State>>();

function trickle(): void {
  for (const socket of trickling) {
    const { sent } = socket.data;
    const isOver = socket.readyState !== 1 || sent >= REQUEST.length - 1;
    if (isOver || socket.write(REQUEST.subarray(sent, sent + 1)) < 0) trickling.delete(socket);
    else socket.data.sent++;
  }
}

/** Connects as fast as it can, and lets those that were let in stay until the end. */
async function flood(port: number, ms: number): Promise<number> {
  const open = new Set<Socket>();
  const end = performance.now() + ms;
  let connections = 0;
  const connectOn = async () => {
    while (performance.now() < end) {
      const { promise: refused, resolve: over } = Promise.withResolvers<void>();
      const socket = {
        open(socket: Socket) {
          connections++;
          open.add(socket);
        },
        data() {},
        // Cut rather than closed: a port of ours that lingers is one less to come from.
        end: (socket: Socket) => void socket.terminate(),
        close(socket: Socket) {
          open.delete(socket);
          over();
        },
        error: () => over(),
      };
      await Bun.connect({ hostname: "127.0.0.1", port, socket }).catch(() => over());
      await Promise.race([refused, Bun.sleep(end - performance.now())]);
    }
  };
  await Promise.all(Array.from({ length: FLOOD_WIDTH }, connectOn));
  for (const socket of open) socket.terminate();
  return connections;
}

async function carryOut(port: number, { floodMs = 0, ...kinds }: Order, have: Map<string, number>): Promise<Flood> {
  for (const [kind, count] of Object.entries(kinds) as [Kind, number][]) {
    for (let there = have.get(kind) ?? 0; there < count; there += BATCH)
      await Promise.all(Array.from({ length: Math.min(BATCH, count - there) }, () => add(kind, port)));
    have.set(kind, count);
  }
  const connections = floodMs > 0 ? await flood(port, floodMs) : 0;
  return { connections, endedAt: Date.now() };
}

if (import.meta.main) {
  const [port, first] = process.argv.slice(2);
  const have = new Map<string, number>();
  setInterval(trickle, TRICKLE_MS);
  if (first) await carryOut(Number(port), JSON.parse(first), have);
  for await (const line of console) {
    console.log(JSON.stringify(await carryOut(Number(port), JSON.parse(line), have)));
  }
  process.exit(0);
}
