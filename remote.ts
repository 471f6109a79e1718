/**
 * A server, as an object that may come and go: each call of `Remote` connects when it must, is tried again when the
 * connection is lost, and follows the server's redirects.
 *
 * A download goes to a `Target`, which remembers how much it holds of which version; after any failure the transfer goes
 * on at the first byte that the target does not hold.
 */
import { type Connection, type ConnectOptions, connect, formatAddress, Pace, sleep } from "./connection.ts";
import {
  type Answer,
  BufferPool,
  DEFAULT_PORT,
  decodeAnswer,
  type Entry,
  ERRORS,
  encodeHello,
  encodeRequest,
  HEADER_BYTES,
  MAX_ANSWER_BYTES,
  type Meta,
  quote,
  RepriseError,
  type Request,
  TO_THE_END,
} from "./protocol.ts";
import type { Target } from "./resume.ts";

const MAX_REDIRECTS = 5;
/** The first wait before trying again; each further one is twice as long, up to the last, with jitter. */
const FIRST_RETRY_MS = 200;
const LAST_RETRY_MS = 10_000;
/** At a limited rate, one request asks for what this long brings. */
const STRETCH_MS = 5_000;

export interface Address {
  host: string;
  port: number;
}

export interface RemoteOptions {
  /** Tried in turn. */
  servers: Address[];
  /** Every wait for the server ends after this long without a byte. */
  timeoutMs?: number;
  /** Attempts after the first, counted anew once bytes have arrived. */
  retries?: number;
  /** Bytes a second. */
  limitRate?: number | undefined;
  /** Aborting ends any call with the signal's reason. */
  signal?: AbortSignal | undefined;
  /** Told of what does not end a call: another attempt, another start. */
  note?: (text: string) => void;
}

export interface DownloadHooks {
  /** The version that comes; it starts at `offset`. */
  begin?(meta: Meta, offset: number): void;
  /** So many bytes are checked now, from the file's start. */
  progress?(bytes: number): void;
}

/** A server, or several that hold the same, as an object with the protocol's actions for methods. */
export class Remote {
  readonly #options: Required<Omit<RemoteOptions, "limitRate" | "signal">>;
  readonly #signal: AbortSignal | undefined;
  readonly #pace: Pace | undefined;
  readonly #connecting: Omit<ConnectOptions, "host" | "port">;
  readonly #free: (content: Uint8Array) => void;
  #peer: Peer | undefined;
  /** Calls take turns: a connection answers in order, and each call takes its own answers. */
  #turnEnds: Promise<void> = Promise.resolve();
  #turn = 0;

  constructor(options: RemoteOptions) {
    this.#options = { timeoutMs: 30_000, retries: 10, note: () => {}, ...options };
    this.#signal = options.signal;
    this.#pace = options.limitRate ? new Pace(options.limitRate) : undefined;
    const pool = new BufferPool(MAX_ANSWER_BYTES + 2 * HEADER_BYTES);
    this.#free = (content) => pool.give(content);
    const { timeoutMs } = this.#options;
    this.#connecting = { maxLength: MAX_ANSWER_BYTES, pool, timeoutMs, signal: options.signal };
  }

  /** Throws `not_found`, `bad_name`, `refused`, or `lost` after all attempts, as do all of these. */
  stat(path: string): Promise<Meta> {
    return this.#call(async (peer) => {
      await peer.ask({ action: "stat", path });
      const { kind, size, mtime, etag } = await peer.expect("meta");
      return { kind, size, mtime, etag };
    });
  }

  /**
   * The entries of a folder, in the server's order, with those of the folders below it if `recursive`. Until the first
   * is there this is tried again like everything else; a list that is cut later throws `lost`.
   */
  async *list(path: string, recursive = false): AsyncGenerator<Entry> {
    const endTurn = await this.#takeTurn();
    let complete = false;
    try {
      const peer = await this.#attempt(async (peer) => {
        await peer.ask({ action: "list", path, recursive });
        await peer.peek();
        return peer;
      });
      let count = 0;
      for (;;) {
        const answer = await peer.expect("entries", "end");
        if (answer.type === "end") {
          if (answer.count !== count) throw unexpected(`the end after ${count} of ${answer.count} entries`);
          break;
        }
        count += answer.entries.length;
        // Not `yield*`, which in an async generator takes two thirds longer.
        for (const entry of answer.entries) yield entry;
      }
      complete = true;
    } finally {
      // Whoever stops half-way leaves answers behind that nobody will take.
      if (!complete) this.#drop();
      endTurn();
    }
  }

  status(): Promise<Record<string, unknown>> {
    return this.#call(async (peer) => {
      await peer.ask({ action: "status" });
      return (await peer.expect("info")).info;
    });
  }

  /**
   * Brings `target` to hold all of one version of `path`, and returns that version. A file that changed is started
   * again where the target allows it, else this throws `changed`. Throws `checksum` when damage stays, `local` for
   * errors of the target.
   */
  async download(path: string, target: Target, hooks: DownloadHooks = {}): Promise<Meta> {
    const renewal: Renewal = { pending: false };
    for (let restarts = 0; ; restarts++) {
      try {
        return await this.#call((peer) => this.#fetch(peer, path, target, hooks, renewal));
      } catch (error) {
        if (!(error instanceof RepriseError) || error.code !== "changed") throw error;
        if (!target.restartable && target.bytes > 0) {
          throw new RepriseError(
            "changed",
            `${error.message} after ${target.bytes} bytes were given out; get it again`,
          );
        }
        if (restarts >= this.#options.retries) {
          throw new RepriseError("changed", `${error.message}, again and again; get it when it is at rest`);
        }
        this.#options.note(`${error.message}; starting again`);
        renewal.pending = true;
      }
    }
  }

  /** Lets go of the connection; the server sees it end between two requests. */
  close(): void {
    this.#drop();
  }

  /** The same, and the server has said goodbye. */
  async quit(): Promise<void> {
    const peer = this.#peer;
    this.#peer = undefined;
    await peer?.quit();
  }

  /** With a renewal pending, what the target holds is given up, but not before another version is there. */
  async #fetch(peer: Peer, path: string, target: Target, hooks: DownloadHooks, renewal: Renewal): Promise<Meta> {
    let giveUp = renewal.pending;
    const start = giveUp ? 0 : target.bytes;
    for (;;) {
      const { etag, bytes: offset } = giveUp ? { etag: "", bytes: 0 } : target;
      await peer.ask({ action: "get", path, offset, length: this.#stretch(), etag });
      const { type: _, offset: given, ...meta } = await peer.expect("meta");
      if (meta.kind !== "file" || meta.etag === "") throw unexpected("a file without a version");
      if (given !== offset || (etag !== "" && meta.etag !== etag)) throw unexpected("another part than was asked for");
      if (giveUp) target.reset();
      giveUp = renewal.pending = false;
      target.begin(meta);
      if (offset === start) hooks.begin?.(meta, offset);
      try {
        await this.#receive(peer, target, meta.size, hooks);
      } finally {
        await target.settle();
      }
      if (target.bytes === meta.size) return meta;
      if (target.bytes === offset) throw unexpected(`the end after ${offset} of ${meta.size} bytes`);
    }
  }

  /** All at once; at a limited rate as much as that takes in a while, so that no buffer on the way fills up and stalls. */
  #stretch(): number {
    return this.#pace ? Math.ceil((this.#pace.rate * STRETCH_MS) / 1000) : TO_THE_END;
  }

  async #receive(peer: Peer, target: Target, size: number, hooks: DownloadHooks): Promise<void> {
    let { bytes } = target;
    const start = bytes;
    for (;;) {
      const answer = await peer.expect("data", "end");
      if (answer.type === "end") {
        if (answer.count === bytes - start) return;
        throw unexpected(`the end after ${bytes - start} of ${answer.count} bytes`);
      }
      const { content, crc32 } = answer;
      bytes += content.length;
      if (bytes > size) throw unexpected("more content than announced");
      peer.progress = true;
      await target.append(content, crc32, this.#free);
      hooks.progress?.(bytes);
      await this.#pace?.take(content.length, this.#signal);
    }
  }

  async #call<T>(work: (peer: Peer) => Promise<T>): Promise<T> {
    const endTurn = await this.#takeTurn();
    try {
      return await this.#attempt(work);
    } finally {
      endTurn();
    }
  }

  /** Waits for the calls before this one; returns what lets the next one begin. */
  async #takeTurn(): Promise<() => void> {
    const before = this.#turnEnds;
    const { promise, resolve } = Promise.withResolvers<void>();
    this.#turnEnds = promise;
    await before;
    return resolve;
  }

  /** The retry loop around everything: connects where needed, follows redirects, waits longer after each failure. */
  async #attempt<T>(work: (peer: Peer) => Promise<T>): Promise<T> {
    let failures = 0;
    let unreached = 0;
    for (;;) {
      const old = this.#peer;
      try {
        this.#signal?.throwIfAborted();
        return await this.#follow(work);
      } catch (error) {
        const peer = this.#peer;
        if (!(error instanceof RepriseError)) throw this.#drop(error);
        // Nothing was reached: the next of the list, at once.
        if (!peer && error.code === "lost" && ++unreached < this.#options.servers.length) {
          this.#turn++;
          continue;
        }
        unreached = 0;
        const { retry, closes } = ERRORS[error.code];
        if (!retry) throw closes || error.code === "local" ? this.#drop(error) : error;
        // A connection kept from an earlier call may have been closed meanwhile: that is no failure.
        const stale = peer !== undefined && peer === old && !peer.answered;
        this.#drop();
        if (stale) continue;
        if (peer?.progress) failures = 0;
        await this.#waitAfter(error, ++failures);
      }
    }
  }

  async #waitAfter(error: RepriseError, failures: number): Promise<void> {
    const { retries, note } = this.#options;
    if (failures > retries) {
      if (retries === 0) throw error;
      throw new RepriseError(error.code, `${error.message} (given up after ${retries} retries)`, error);
    }
    this.#turn++;
    const wait = Math.min(LAST_RETRY_MS, FIRST_RETRY_MS * 2 ** (failures - 1)) * (0.75 + Math.random() / 2);
    note(`${error.message}; trying again in ${(wait / 1000).toFixed(1)} s (${failures} of ${retries})`);
    await sleep(wait, this.#signal);
  }

  /** Runs `work` at the server, or where the server sends it. */
  async #follow<T>(work: (peer: Peer) => Promise<T>): Promise<T> {
    const { servers } = this.#options;
    const seen = new Set<string>();
    let address = servers[this.#turn % servers.length]!;
    for (;;) {
      try {
        this.#peer ??= await Peer.open({ ...address, ...this.#connecting });
        this.#peer.answered = false;
        return await work(this.#peer);
      } catch (error) {
        if (!(error instanceof Redirected)) throw error;
        this.#drop();
        address = error.address;
        const name = formatAddress(address.host, address.port);
        if (seen.size >= MAX_REDIRECTS || seen.has(name)) throw unexpected(`redirects in a circle, last to ${name}`);
        seen.add(name);
      }
    }
  }

  #drop(error?: unknown): unknown {
    this.#peer?.close();
    this.#peer = undefined;
    return error;
  }
}

/** Of a target whose version is no longer to be had: it holds over attempts until another version comes. */
interface Renewal {
  pending: boolean;
}

/** The server's REDIRECT. */
class Redirected extends Error {
  readonly address: Address;
  constructor(address: Address) {
    super(`redirected to ${formatAddress(address.host, address.port)}`);
    this.address = address;
  }
}

/** One connection to a server: requests go out, answers come in their order. HELLO travels with the first request. */
class Peer {
  readonly #connection: Connection;
  readonly #signal: AbortSignal | undefined;
  readonly #onAbort = () => this.#connection.fail(this.#signal?.reason);
  #greeted = false;
  #peeked: Answer | undefined;
  /** An answer has come since the last call began, rather than the end of the connection. */
  answered = false;
  /** Content has come on this connection. */
  progress = false;

  static async open(options: ConnectOptions): Promise<Peer> {
    const connection = await connect(options);
    await connection.send(encodeHello());
    return new Peer(connection, options.signal);
  }

  private constructor(connection: Connection, signal: AbortSignal | undefined) {
    this.#connection = connection;
    this.#signal = signal;
    signal?.addEventListener("abort", this.#onAbort, { once: true });
  }

  ask(request: Request): Promise<void> {
    return this.#connection.send(encodeRequest(request));
  }

  /** The next answer, which must be of one of these types. Throws what the server says is wrong. */
  async expect<T extends Answer["type"]>(...types: T[]): Promise<Extract<Answer, { type: T }>> {
    const answer = this.#peeked ?? (await this.#answer());
    this.#peeked = undefined;
    if (!(types as string[]).includes(answer.type))
      throw unexpected(`${answer.type} in place of ${types.join(" or ")}`);
    return answer as Extract<Answer, { type: T }>;
  }

  /** Waits for the next answer and leaves it to `expect`. */
  async peek(): Promise<void> {
    this.#peeked ??= await this.#answer();
  }

  async quit(): Promise<void> {
    try {
      await this.ask({ action: "quit" });
      await this.#connection.finish();
    } catch {
      // It has gone already, which is what was wanted.
    }
    this.close();
  }

  close(): void {
    this.#signal?.removeEventListener("abort", this.#onAbort);
    this.#connection.close();
  }

  async #answer(): Promise<Answer> {
    if (!this.#greeted) {
      const welcome = await this.#read();
      if (welcome.type !== "welcome") throw unexpected(`${welcome.type} in place of welcome`);
      this.#greeted = true;
    }
    return this.#read();
  }

  /** A server that has said WELCOME speaks the protocol: what then can't be understood was damaged on the way. */
  async #next(): Promise<Answer | undefined> {
    try {
      const frame = await this.#connection.next();
      return frame && decodeAnswer(frame);
    } catch (error) {
      const damaged = this.#greeted && error instanceof RepriseError && error.code === "bad_frame";
      throw damaged ? new RepriseError("checksum", undefined, error) : error;
    }
  }

  async #read(): Promise<Answer> {
    const answer = await this.#next();
    if (!answer) throw new RepriseError("lost", "the server closed the connection");
    const isLast = answer.type === "error" && ERRORS[answer.error.code].closes;
    if (!isLast) this.answered = true;
    if (answer.type === "error") throw answer.error;
    if (answer.type === "redirect") throw new Redirected(answer);
    return answer;
  }
}

function unexpected(what: string): RepriseError {
  return new RepriseError("bad_frame", `the server does not keep to the protocol: ${what}`);
}

/** `host`, `host:port`, `[v6]:port`, each with `tcp://` if liked, several with commas. Throws `usage`. */
export function parseServers(text: string): Address[] {
  return text.split(",").map((item) => {
    const match = /^(?:tcp:\/\/)?(?:\[([0-9a-f:.%]+)\]|([^\s:/[\]]+))(?::(\d{1,5}))?\/?$/i.exec(item.trim());
    const port = Number(match?.[3] ?? DEFAULT_PORT);
    if (!match || port < 1 || port > 65_535)
      throw new RepriseError("usage", `--server takes host:port, not ${quote(item)}`);
    return { host: (match[1] ?? match[2])!, port };
  });
}
