/**
 * A server, as an object that may come and go: each call of `Remote` connects when it must, is tried again when the
 * connection is lost, and follows the server's redirects.
 *
 * A download goes to a `Target`, which remembers how much it holds of which version; after any failure the transfer goes
 * on at the first byte that the target does not hold.
 */
import { type ConnectOptions, Pace, sleep } from "./connection.ts";
import type { Holders } from "./holders.ts";
import {
  type Address,
  checkMeta,
  nameOf,
  Peer,
  type PeerOptions,
  Redirected,
  Route,
  SentOn,
  unexpected,
} from "./peer.ts";
import { Dropped, type Exchange, Haste, Pipeline, retryMs, type Supply } from "./pipeline.ts";
import {
  BufferPool,
  DEFAULT_PORT,
  type Entry,
  ERRORS,
  HEADER_BYTES,
  MAX_ANSWER_BYTES,
  MAX_CONTENT_BYTES,
  type Meta,
  quote,
  RepriseError,
  type Request,
  TO_THE_END,
} from "./protocol.ts";
import type { Target } from "./resume.ts";
import type { Source } from "./source.ts";
import type { PutOptions, UploadHooks } from "./upload.ts";

/** In the middle of a large frame the process waits this long for the rest of it before others get their turn. */
const DIRECT_WAIT_MS = 1;
/** At a limited rate, so many chunks a second. */
const PACED_CHUNKS = 8;
/** At a limited rate, one request asks for what this long brings. */
const STRETCH_MS = 5_000;

export interface RemoteOptions {
  /** Tried in turn. */
  servers: Address[];
  /** They are to answer themselves, rather than send on to others. */
  direct?: boolean;
  /** Every wait for the server ends after this long without a byte. */
  timeoutMs?: number;
  /** Attempts after the first, counted anew once bytes have arrived. */
  retries?: number;
  /** Bytes a second. */
  limitRate?: number | undefined;
  /** Sent to these servers, and to whom they redirect, over TLS or within this machine. */
  token?: string | undefined;
  /** See ConnectOptions. */
  ca?: string | undefined;
  /** In place of `limitRate`: what several share. */
  pace?: Pace | undefined;
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
  readonly #options: Required<Omit<RemoteOptions, "limitRate" | "pace" | "signal" | "token" | "ca">>;
  readonly #givenUp = new AbortController();
  readonly #signal: AbortSignal;
  readonly #pace: Pace | undefined;
  readonly #connecting: PeerOptions & Omit<ConnectOptions, "host" | "port">;
  #peer: Peer | undefined;
  /** Calls take turns: a connection answers in order, and each call takes its own answers. */
  #turnEnds: Promise<void> = Promise.resolve();
  #turn = 0;
  /** The connection is to a server that another one has sent to. */
  #isSentOn = false;

  constructor(options: RemoteOptions) {
    this.#options = { timeoutMs: 30_000, retries: 10, direct: false, note: () => {}, ...options };
    const own = this.#givenUp.signal;
    this.#signal = options.signal ? AbortSignal.any([options.signal, own]) : own;
    this.#pace = options.pace ?? (options.limitRate ? new Pace(options.limitRate) : undefined);
    const pool = new BufferPool(MAX_ANSWER_BYTES + 2 * HEADER_BYTES);
    const { timeoutMs } = this.#options;
    const common = { maxLength: MAX_ANSWER_BYTES, pool, timeoutMs, directWaitMs: DIRECT_WAIT_MS };
    const { token, ca } = options;
    this.#connecting = { ...common, token, ca, signal: this.#signal, pace: this.#pace };
  }

  /** Throws `not_found`, `bad_name`, `refused`, or `lost` after all attempts, as do all of these. */
  stat(path: string): Promise<Meta> {
    return this.#call(async (peer) => {
      await peer.ask({ action: "stat", path });
      const { kind, size, mtime, etag } = await peer.expectHeld("meta");
      return { kind, size, mtime, etag };
    });
  }

  /**
   * The entries of a folder, in the server's order, with those of the folders below it if `recursive`. Until the first
   * is there this is tried again like everything else; a list that is cut later throws `lost`.
   */
  async *list(path: string, recursive = false): AsyncGenerator<Entry> {
    for await (const entries of this.listMany(path, recursive)) {
      // Not `yield*`, which in an async generator takes two thirds longer.
      for (const entry of entries) yield entry;
    }
  }

  /** The same, as many at a time as come together. */
  async *listMany(path: string, recursive = false): AsyncGenerator<Entry[]> {
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
        yield answer.entries;
      }
      complete = true;
    } finally {
      // Whoever stops half-way leaves answers behind that nobody will take.
      if (!complete) this.#drop();
      endTurn();
    }
  }

  /** Throws `not_found`, and `refused` for a folder that is not asked for as such. As all changes: `read_only`. */
  remove(path: string, recursive = false): Promise<void> {
    return this.#change({ action: "remove", path, recursive }, (error) => error.code === "not_found");
  }

  /** Throws `exists` where something has the new name, unless `overwrite`. */
  move(path: string, to: string, overwrite = false): Promise<void> {
    return this.#change({ action: "move", path, to, overwrite }, async (error, peer) => {
      if (error.code !== "not_found") return false;
      await peer.ask({ action: "stat", path: to });
      // Wherever it is, it is there.
      await peer.expect("meta", "redirect");
      return true;
    });
  }

  /** With `parents` also the folders above, and no error if it is there. Throws `exists`. */
  makeFolder(path: string, parents = false): Promise<void> {
    return this.#change({ action: "mkdir", path, parents }, (error) => error.code === "exists");
  }

  /** Checksums of a file piece by piece, SUM_BYTES each. */
  async sums(path: string): Promise<{ length: number; crc32: number }[]> {
    return this.#call((peer) => peer.sums("", path));
  }

  /** Puts one source, and returns the new version. Throws `local`, `exists`, `changed`, `no_room`. */
  async upload(options: PutOptions, source: Source, hooks: UploadHooks = {}, resumes = false): Promise<Meta> {
    // Not for those who only fetch: it is a tenth of a small download to load.
    const { UploadExchange } = await import("./upload.ts");
    const upload = new UploadExchange(this, options, source, hooks, resumes);
    await this.run([upload]);
    return upload.result();
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
        // A segment is one of several, whose others may have content of the version that was.
        if (!target.restartable && (target.bytes > 0 || target.end !== undefined)) throw error;
        if (restarts >= this.#options.retries) {
          throw new RepriseError("changed", `${error.message}, again and again; get it when it is at rest`);
        }
        this.#options.note(`${error.message}; starting again`);
        renewal.pending = true;
      }
    }
  }

  /** Ends what runs, with `interrupted`. */
  giveUp(): void {
    this.#givenUp.abort(new RepriseError("interrupted"));
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
      const end = giveUp ? undefined : target.end;
      const length = Math.min(this.#stretch(), end === undefined ? TO_THE_END : end - offset);
      await peer.ask({ action: "get", path, offset, length, etag });
      const answer = await peer.expectHeld("meta", "file");
      const { kind, size, mtime, etag: found } = answer;
      const meta = { kind, size, mtime, etag: found };
      const given = answer.type === "meta" ? answer.offset : 0;
      checkMeta(meta, given, { offset, etag });
      if (giveUp) target.reset();
      giveUp = renewal.pending = false;
      target.begin(meta);
      if (offset === start) hooks.begin?.(meta, offset);
      try {
        if (answer.type === "meta") await peer.receive(target, size, hooks.progress);
        else await peer.receiveWhole(target, answer.content, hooks.progress);
      } finally {
        await target.settle();
      }
      if (target.bytes === (target.end ?? meta.size)) return meta;
      if (target.bytes === offset) throw unexpected(`the end after ${offset} of ${meta.size} bytes`);
    }
  }

  /** All at once; at a limited rate as much as that takes in a while, so that no buffer on the way fills up and stalls. */
  #stretch(): number {
    return this.#pace ? Math.ceil((this.#pace.rate * STRETCH_MS) / 1000) : TO_THE_END;
  }

  /**
   * Runs many exchanges over one connection, each asked while the answers of those before it are still under way, so that
   * their number costs no round trips. What was not answered when a connection is lost is asked again on the next.
   * `beforeWait` is called when all that came was used up. What the server sends on goes on there by itself.
   */
  async run(exchanges: Supply | Exchange[], beforeWait?: () => Promise<void>): Promise<void> {
    const supply = Array.isArray(exchanges) ? () => exchanges.shift() : exchanges;
    let holders: Promise<Holders> | undefined;
    const sendOn = (exchange: Exchange, sentOn: SentOn) => {
      holders ??= this.#startHolders(pipeline);
      holders.then((them) => them.add(exchange, sentOn)).catch((error) => pipeline.stop(error));
    };
    const pipeline = new Pipeline(supply, this.#options.retries, this.#signal, { sendOn, beforeWait });
    try {
      await this.#call((peer) => pipeline.run(peer));
    } finally {
      await (await holders)?.close();
    }
  }

  /** Not loaded where nothing is sent on. */
  async #startHolders(pipeline: Pipeline): Promise<Holders> {
    const { Holders } = await import("./holders.ts");
    const open = (address: Address) => Peer.open({ ...address, direct: true, ...this.#connecting });
    return new Holders(pipeline, open, this.#options, this.#signal);
  }

  /**
   * Runs `work` where a server has sent it on to, over a connection of its own; that to the server stays. `progressed` is
   * called where content has come before a failure.
   */
  async elsewhere<T>(sentOn: SentOn, work: (peer: Peer) => Promise<T>, progressed = () => {}): Promise<T> {
    let route = new Route(sentOn.from, "failed");
    for (let next: Redirected = sentOn; ; ) {
      const holder = await Peer.open({ ...route.next(next.address), direct: true, ...this.#connecting });
      try {
        return await work(holder);
      } catch (error) {
        if (holder.progress) progressed();
        if (!(error instanceof SentOn)) throw error;
        // What has come since then is behind it: where the rest is to be had is another question.
        if (holder.progress) route = new Route(holder.address, "failed");
        next = error;
      } finally {
        holder.close();
      }
    }
  }

  note(text: string): void {
    this.#options.note(text);
  }

  get retries(): number {
    return this.#options.retries;
  }

  /** Content of a DATA frame. */
  get chunkBytes(): number {
    const most = this.#pace ? Math.floor(this.#pace.rate / PACED_CHUNKS) : MAX_CONTENT_BYTES;
    return Math.max(1, Math.min(MAX_CONTENT_BYTES, most));
  }

  /** A change whose answer was lost may have been made: `isDone` tells by the error that the second attempt gets. */
  #change(request: Request, isDone: (error: RepriseError, peer: Peer) => boolean | Promise<boolean>): Promise<void> {
    let asked = false;
    return this.#call(async (peer) => {
      const again = asked;
      await peer.ask(request);
      asked = true;
      try {
        await peer.expect("end");
      } catch (error) {
        // Said unasked, before the request was read.
        if (error instanceof RepriseError && ["idle", "busy", "shutting_down"].includes(error.code)) asked = again;
        if (!again || !(error instanceof RepriseError) || !(await isDone(error, peer))) throw error;
      }
    });
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
    const haste = new Haste();
    let [failures, waits, unreached] = [0, 0, 0];
    for (;;) {
      const old = this.#peer;
      const course = { isSentOn: false, progress: false };
      try {
        this.#signal?.throwIfAborted();
        return await this.#follow(work, course);
      } catch (error) {
        const peer = this.#peer;
        if (error instanceof Dropped) {
          this.#drop();
          continue;
        }
        if (!(error instanceof RepriseError)) throw this.#drop(error);
        // Nothing was reached: the next of the list, at once.
        if (!peer && !course.isSentOn && error.code === "lost" && ++unreached < this.#options.servers.length) {
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
        const progress = course.progress || peer?.progress === true;
        if (progress) failures = waits = 0;
        failures++;
        const isHurried = course.isSentOn && haste.take(progress);
        checkTries(error, failures, this.#options.retries);
        if (isHurried) this.#noteHurried(error, failures);
        else await this.#waitAfter(error, failures, ++waits);
      }
    }
  }

  #noteHurried(error: RepriseError, failures: number): void {
    const { retries, note } = this.#options;
    note(`${error.message}; asking ${nameOf(this.#named)} again (${failures} of ${retries})`);
  }

  async #waitAfter(error: RepriseError, failures: number, waits: number): Promise<void> {
    const { retries, note } = this.#options;
    this.#turn++;
    const wait = retryMs(waits);
    note(`${error.message}; trying again in ${(wait / 1000).toFixed(1)} s (${failures} of ${retries})`);
    await sleep(wait, this.#signal);
  }

  /** The one of the list whose turn it is. */
  get #named(): Address {
    const { servers } = this.#options;
    return servers[this.#turn % servers.length]!;
  }

  /** Runs `work` at the server, or where the server sends it; `course` then tells how far it has come. */
  async #follow<T>(work: (peer: Peer) => Promise<T>, course: Course): Promise<T> {
    let { direct } = this.#options;
    let address = this.#named;
    const route = new Route(address, "bad_frame");
    if (!this.#peer) this.#isSentOn = false;
    for (;;) {
      course.isSentOn = this.#isSentOn;
      try {
        this.#peer ??= await Peer.open({ ...address, direct, ...this.#connecting });
        this.#peer.answered = false;
        return await work(this.#peer);
      } catch (error) {
        if (error instanceof SentOn) {
          course.isSentOn = true;
          return await this.elsewhere(error, work, () => {
            course.progress = true;
          });
        }
        if (!(error instanceof Redirected)) throw error;
        this.#drop();
        this.#isSentOn = true;
        address = route.next(error.address);
        direct ||= error.direct;
      }
    }
  }

  #drop(error?: unknown): unknown {
    this.#peer?.close();
    this.#peer = undefined;
    return error;
  }
}

/** Of an attempt that has failed. */
interface Course {
  /** It failed at a server that another one had sent to. */
  isSentOn: boolean;
  /** Content had come. */
  progress: boolean;
}

/** Throws `error`, if that was the last attempt. */
export function checkTries(error: RepriseError, failures: number, retries: number): void {
  if (failures <= retries) return;
  if (retries === 0) throw error;
  throw new RepriseError(error.code, `${error.message} (given up after ${retries} retries)`, error);
}

/** Of a target whose version is no longer to be had: it holds over attempts until another version comes. */
interface Renewal {
  pending: boolean;
}

/**
 * `host`, `host:port`, `[v6]:port`, several with commas; `tls://` or `tcp://` before one counts for those behind it as well.
 * Throws `usage`.
 */
export function parseServers(text: string): Address[] {
  let scheme = "tcp";
  return text.split(",").map((item) => {
    const match = /^(?:(tcp|tls):\/\/)?(?:\[([0-9a-f:.%]+)\]|([^\s:/[\]]+))(?::(\d{1,5}))?\/?$/i.exec(item.trim());
    const port = Number(match?.[4] ?? DEFAULT_PORT);
    if (!match || port < 1 || port > 65_535)
      throw new RepriseError("usage", `--server takes host:port, not ${quote(item)}`);
    // Whoever asks for TLS does not want the next one, which only has no word before it, in clear.
    scheme = match[1]?.toLowerCase() ?? scheme;
    return { host: (match[2] ?? match[3])!.toLowerCase(), port, tls: scheme === "tls" };
  });
}
