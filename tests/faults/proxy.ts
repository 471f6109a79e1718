/**
 * A wire that can be spoiled: a TCP proxy on a free port which delays, cuts, damages or stalls what passes, in either
 * direction, on the connections that a test names.
 *
 * ```ts
 * using proxy = startProxy({
 *   target: server.port,
 *   spoil: (connection) => (connection === 1 ? { toClient: { cutAt: 700_000 } } : {}),
 * });
 * ```
 *
 * Each direction of a connection is a `Lane`: pieces wait in it until they are due and the other side takes them, and its
 * end travels behind them. The reader is the limit: while more waits than may, no more is read. Places are counted in bytes
 * from the start of the direction, so that the same faults with the same peers hit the same byte.
 */
import type { Socket } from "bun";

/** What may wait in one direction of a wire that delays: 2.5 GB/s at 100 ms. Others hold what one write did not take. */
const IN_FLIGHT_BYTES = 256 * 2 ** 20;

export type Direction = "toClient" | "toServer";

/** What befalls one direction of one connection; places are bytes from its start. */
export interface Faults {
  /** Every byte arrives so much later. */
  delay_ms?: number | undefined;
  /** So many bytes come over, then both sides are closed. */
  cutAt?: number | undefined;
  /** One bit of this byte comes over the other way round. */
  flipAt?: number | undefined;
  /** So many bytes come over; those behind are taken, and never arrive. */
  stallAt?: number | undefined;
}

/** Returns what to pass on of a piece whose first byte has this place, or undefined to cut the connection at once. */
export type Hook = (bytes: Uint8Array, offset: number, connection: number) => Uint8Array | undefined;

export interface ProxyOptions extends Partial<Record<Direction, Hook>> {
  target: number;
  /** For each connection, counted from 1, what befalls it. */
  spoil?: (connection: number) => Partial<Record<Direction, Faults>>;
}

export interface Wire extends Disposable {
  readonly port: number;
  readonly address: string;
  /** How many there were so far. */
  readonly connections: number;
  /** The bytes that each connection has sent, so far, in one direction. */
  sent(direction: Direction): number[];
}

export function startProxy({ target, spoil = () => ({}), ...hooks }: ProxyOptions): Wire {
  const links: Link[] = [];
  const listener = Bun.listen<Lane>({
    hostname: "127.0.0.1",
    port: 0,
    allowHalfOpen: true,
    socket: {
      ...handlers,
      open(client) {
        const link = new Link(links.length + 1, client, hooks, spoil(links.length + 1));
        links.push(link);
        link.connect(target);
      },
    },
  });
  return {
    port: listener.port,
    address: `127.0.0.1:${listener.port}`,
    get connections() {
      return links.length;
    },
    sent: (direction) => links.map((link) => link[direction].offset),
    [Symbol.dispose]() {
      listener.stop(true);
      for (const link of links) link.cut();
    },
  };
}

// ---------------------------------------------------------------------------------------------------- connection

/** A socket's data is the lane that it feeds. */
const handlers = {
  data: (socket: Socket<Lane>, bytes: Buffer) => socket.data.take(bytes),
  end: (socket: Socket<Lane>) => socket.data.finish(),
  drain: (socket: Socket<Lane>) => socket.data.back.flush(),
  close: (socket: Socket<Lane>) => socket.data.lose(),
  error: () => {},
};

/** One connection of the proxy: a socket to either side, and a lane in either direction. */
class Link {
  readonly toClient: Lane;
  readonly toServer: Lane;
  #isCut = false;

  constructor(
    number: number,
    client: Socket<Lane>,
    hooks: Partial<Record<Direction, Hook>>,
    faults: Partial<Record<Direction, Faults>>,
  ) {
    const laneOf = (direction: Direction) => new Lane(this, number, hooks[direction], faults[direction] ?? {});
    this.toClient = laneOf("toClient");
    this.toServer = laneOf("toServer");
    this.toClient.sink = this.toServer.source = client;
    client.data = this.toServer;
    client.setNoDelay(true);
  }

  /** As on a real wire, a connection costs its round trip: the far side sees it one way later than it was asked for. */
  async connect(port: number): Promise<void> {
    const way_ms = this.toServer.delay_ms;
    this.toServer.hold();
    if (way_ms > 0) await Bun.sleep(2 * way_ms);
    this.toServer.release();
    if (way_ms > 0) await Bun.sleep(way_ms);
    if (this.#isCut) return;
    try {
      const options = { hostname: "127.0.0.1", port, allowHalfOpen: true, data: this.toClient };
      const server = await Bun.connect<Lane>({ ...options, socket: handlers });
      this.toClient.source = this.toServer.sink = server;
      server.setNoDelay(true);
      if (this.#isCut) this.cut();
      this.toServer.flush();
    } catch {
      // Nobody listens there: who has connected here learns it in this way.
      this.cut();
    }
  }

  /** Closes both sides at once. */
  cut(): void {
    this.#isCut = true;
    for (const socket of [this.toClient.sink, this.toServer.sink]) socket?.terminate();
  }
}

/** One direction of a connection. */
class Lane {
  source: Socket<Lane> | undefined;
  sink: Socket<Lane> | undefined;
  /** Bytes that were taken from the source. */
  offset = 0;
  readonly delay_ms: number;
  readonly #link: Link;
  readonly #number: number;
  readonly #hook: Hook;
  readonly #faults: Faults;
  readonly #limit: number;
  /** In their order. Those that are due are the first of them. */
  readonly #waiting: Uint8Array[] = [];
  #waitingBytes = 0;
  #due = 0;
  #isHeld = false;
  /** What happens behind the last piece. */
  #end: (() => void) | undefined;

  constructor(link: Link, number: number, hook: Hook = (bytes) => bytes, faults: Faults) {
    this.#link = link;
    this.#number = number;
    this.#hook = hook;
    this.#faults = faults;
    this.delay_ms = faults.delay_ms ?? 0;
    this.#limit = this.delay_ms > 0 ? IN_FLIGHT_BYTES : 0;
  }

  /** The other direction. */
  get back(): Lane {
    return this === this.#link.toClient ? this.#link.toServer : this.#link.toClient;
  }

  /** No more is read from the source until `release`. */
  hold(): void {
    this.#isHeld = true;
    this.source?.pause();
  }

  release(): void {
    if (!this.#isHeld) return;
    this.#isHeld = false;
    this.source?.resume();
  }

  /** A piece of what the source sends; what comes behind a cut or the end counts for nothing. */
  take(bytes: Uint8Array): void {
    if (this.#end) return;
    const { offset } = this;
    this.offset += bytes.length;
    const passed = this.#hook(this.#spoil(bytes, offset), offset, this.#number);
    if (passed) this.#queue(passed);
    else this.#link.cut();
    if (this.offset >= (this.#faults.cutAt ?? Number.POSITIVE_INFINITY)) this.#finishWith(() => this.#close());
  }

  /** The source has ended, and may still be sent to. */
  finish(): void {
    this.#finishWith(() => this.sink?.shutdown());
  }

  /** The source has gone: what it has sent still arrives, and nothing more goes to it. */
  lose(): void {
    this.#end = undefined;
    this.#finishWith(() => this.sink?.end());
  }

  /** Not by a reset, which would take back what has come over and is not yet read. */
  #close(): void {
    this.sink?.end();
    this.source?.terminate();
  }

  /** Sends what is due, as far as it is taken. */
  flush(): void {
    const { sink } = this;
    if (!sink) return;
    while (this.#due > 0 && this.#waiting[0]) {
      const taken = Math.max(0, sink.write(this.#waiting[0]));
      this.#waitingBytes -= taken;
      if (taken < this.#waiting[0].length) {
        this.#waiting[0] = this.#waiting[0].subarray(taken);
        break;
      }
      this.#waiting.shift();
      this.#due--;
    }
    if (this.#waitingBytes > this.#limit) this.hold();
    else this.release();
    if (this.#waiting.length === 0) this.#end?.();
  }

  #queue(bytes: Uint8Array): void {
    if (bytes.length === 0) return;
    this.#waiting.push(bytes);
    this.#waitingBytes += bytes.length;
    if (this.#waitingBytes > this.#limit && !this.sink) this.hold();
    this.#later(() => {
      this.#due++;
      this.flush();
    });
  }

  #finishWith(end: () => void): void {
    if (this.#end) return;
    this.#end = () => {};
    // A timer like those of the pieces before it; a cut and a loss are not undone by an end that comes behind them.
    this.#later(() => {
      this.#end = end;
      this.flush();
    });
  }

  #later(work: () => void): void {
    if (this.delay_ms > 0) setTimeout(work, this.delay_ms);
    else work();
  }

  #spoil(bytes: Uint8Array, offset: number): Uint8Array {
    const { cutAt, flipAt = -1, stallAt } = this.#faults;
    const last = Math.min(cutAt ?? Number.POSITIVE_INFINITY, stallAt ?? Number.POSITIVE_INFINITY) - offset;
    const at = flipAt - offset;
    if (at >= 0 && at < bytes.length) bytes[at]! ^= 1 << (flipAt % 8);
    return last >= bytes.length ? bytes : bytes.subarray(0, Math.max(0, last));
  }
}
