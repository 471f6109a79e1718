/**
 * Many requests under way at a time on one connection: one loop asks, another takes the answers in their order. What was
 * not answered when a connection is lost is asked again on the next.
 */
import { sleep } from "./connection.ts";
import { type Peer, SentOn } from "./peer.ts";
import { ERRORS, RepriseError } from "./protocol.ts";

/** The first wait before trying again; each further one is twice as long, up to the last, with jitter. */
const FIRST_RETRY_MS = 200;
const LAST_RETRY_MS = 10_000;
/** Requests that are under way on one connection at a time: at 100 ms of round trip, for 40,000 small files a second. */
const MAX_UNDER_WAY = 4096;
/** Of a server that was not named, but sent to: what follows upon its failures at once, one after the other. */
const MAX_HURRIED = 4;
/** It may be done again once content has come, but not many times in this while. */
const HURRY_RENEWED_MS = 1_000;

/** A request and its answer, as one of many that are under way together: see `Remote.run`. */
export interface Exchange {
  /** Local preparation, before each `ask`, if there is any. */
  open?(): Promise<void> | undefined;
  /** What must have been answered before `ask`, if anything; nothing else is then under way. */
  preparation?(): ((peer: Peer) => Promise<void>) | undefined;
  /** Sends the request, again on a new connection if the first was lost. Throws only what ends the connection. */
  ask(peer: Peer): Promise<void> | undefined;
  /** Takes its answer, all of it. Returns true if it must be asked once more. */
  take(peer: Peer): Promise<boolean> | boolean;
  /** It cannot be done. */
  failed(error: RepriseError): void;
}

/** Gives exchanges one by one, at once where it can, and undefined at the end. */
export type Supply = () => Promise<Exchange | undefined> | Exchange | undefined;

/** The rest of an answer is not worth receiving: the next request goes over another connection. */
export class Dropped extends Error {
  readonly problem: RepriseError;
  constructor(problem: RepriseError) {
    super(problem.message);
    this.problem = problem;
  }
}

export interface PipelineHooks {
  /** Takes over an exchange that the server sends on; how that ends is to be told to `settle`. */
  sendOn?: (exchange: Exchange, sentOn: SentOn) => void;
  /** Called when all that came was used up. */
  beforeWait?: (() => Promise<void>) | undefined;
}

/** Exchanges over whatever connections it takes: one loop asks, another takes the answers. */
export class Pipeline {
  readonly #supply: Supply;
  readonly #retries: number;
  readonly #signal: AbortSignal | undefined;
  /** Asked, in the order of their answers. */
  #underWay: Exchange[] = [];
  /** To be asked again. */
  #again: Exchange[] = [];
  readonly #tries = new Map<Exchange, number>();
  #changed: PromiseWithResolvers<void> | undefined;
  #allAsked = false;
  #isCut = false;
  readonly #sendOn: PipelineHooks["sendOn"];
  readonly beforeWait: PipelineHooks["beforeWait"];
  /** How many were sent on and are not settled. */
  #away = 0;
  #peer: Peer | undefined;
  /** Why all of it ends. */
  #problem: unknown;

  constructor(supply: Supply, retries: number, signal?: AbortSignal, hooks: PipelineHooks = {}) {
    this.#supply = supply;
    this.#retries = retries;
    this.#signal = signal;
    this.#sendOn = hooks.sendOn;
    this.beforeWait = hooks.beforeWait;
  }

  /** What was sent on is done with, or to be asked here once more. */
  settle(again?: Exchange): void {
    this.#away--;
    if (again) this.#again.push(again);
    this.#tell();
  }

  /** Makes `run` throw `problem`. */
  stop(problem: unknown): void {
    this.#problem ??= problem;
    this.#isCut = true;
    this.#peer?.close();
    this.#tell();
  }

  async run(peer: Peer): Promise<void> {
    this.#again = [...this.#underWay.splice(0), ...this.#again];
    this.#allAsked = this.#isCut = false;
    this.#peer = peer;
    if (this.#problem) throw this.#problem;
    if (this.beforeWait) peer.beforeWait = () => this.#beforeWait();
    const loops = [this.#askAll(peer), this.#takeAll(peer)];
    try {
      await Promise.all(loops);
    } catch (error) {
      // The other loop must not go on behind the next attempt's back.
      this.#isCut = true;
      peer.close();
      this.#tell();
      await Promise.allSettled(loops);
      throw this.#problem ?? error;
    } finally {
      peer.beforeWait = undefined;
    }
  }

  /** What fails beside the answers is no answer's failure: taken for one, all further answers went to the wrong names. */
  async #beforeWait(): Promise<void> {
    try {
      await this.beforeWait!();
    } catch (error) {
      this.#problem ??= error;
      throw new RepriseError("lost", undefined, error);
    }
  }

  /** No promise is made where nothing is waited for: with many small files that is most of the work. */
  async #askAll(peer: Peer): Promise<void> {
    for (;;) {
      const next = this.#again.shift() ?? this.#supply();
      const exchange = next instanceof Promise ? await next : next;
      if (exchange) {
        const asking = this.#askOne(peer, exchange);
        if (asking) await asking;
      } else if (this.#underWay.length + this.#away > 0)
        await this.#until(() => this.#underWay.length + this.#away === 0 || this.#again.length > 0);
      else break;
    }
    this.#allAsked = true;
    this.#tell();
  }

  #askOne(peer: Peer, exchange: Exchange): Promise<void> | undefined {
    try {
      const opening = exchange.open?.();
      const isSimple = !opening && !exchange.preparation && this.#underWay.length < MAX_UNDER_WAY;
      if (!isSimple) return this.#prepareAndAsk(peer, exchange, opening);
    } catch (error) {
      return this.#refuseOrThrow(exchange, error);
    }
    return this.#send(peer, exchange);
  }

  async #prepareAndAsk(peer: Peer, exchange: Exchange, opening: Promise<void> | undefined): Promise<void> {
    try {
      await opening;
      const prepare = exchange.preparation?.();
      if (prepare) {
        await this.#until(() => this.#underWay.length === 0);
        await prepare(peer);
      }
      await this.#until(() => this.#underWay.length < MAX_UNDER_WAY);
    } catch (error) {
      return this.#refuseOrThrow(exchange, error);
    }
    await this.#send(peer, exchange);
  }

  #send(peer: Peer, exchange: Exchange): Promise<void> | undefined {
    this.#underWay.push(exchange);
    this.#tell();
    return exchange.ask(peer);
  }

  async #refuseOrThrow(exchange: Exchange, error: unknown): Promise<void> {
    if (isOfOne(error)) return this.#refuse(exchange, error);
    this.#again.unshift(exchange);
    throw error;
  }

  async #takeAll(peer: Peer): Promise<void> {
    for (;;) {
      const exchange = this.#underWay[0];
      if (!exchange && this.#allAsked) return;
      if (!exchange) {
        await this.#until(() => this.#underWay.length > 0 || this.#allAsked);
        continue;
      }
      try {
        const taken = exchange.take(peer);
        if (typeof taken === "boolean" ? taken : await taken) this.#again.push(exchange);
      } catch (error) {
        if (error instanceof Dropped) {
          this.#underWay.shift();
          exchange.failed(error.problem);
        }
        if (error instanceof SentOn && this.#sendOn) {
          this.#away++;
          this.#sendOn(exchange, error);
        } else if (isOfOne(error)) await this.#refuse(exchange, error);
        else throw error;
      }
      this.#underWay.shift();
      this.#tell();
    }
  }

  /** It may be another time's turn, a few times, or it cannot be done. */
  async #refuse(exchange: Exchange, error: RepriseError): Promise<void> {
    const tries = (this.#tries.get(exchange) ?? 0) + 1;
    if (!ERRORS[error.code].retry || tries > this.#retries) return exchange.failed(error);
    this.#tries.set(exchange, tries);
    await sleep(retryMs(tries), this.#signal);
    this.#again.push(exchange);
  }

  async #until(condition: () => boolean): Promise<void> {
    while (!condition()) {
      if (this.#isCut) throw new RepriseError("lost");
      this.#changed ??= Promise.withResolvers();
      await this.#changed.promise;
    }
  }

  #tell(): void {
    this.#changed?.resolve();
    this.#changed = undefined;
  }
}

/** Whether an error is about one request, and the connection can go on. */
export function isOfOne(error: unknown): error is RepriseError {
  return error instanceof RepriseError && !ERRORS[error.code].closes;
}

/**
 * Whether to ask a server again at once, after one that it has sent to has failed: it may name another by now, but may
 * also take its time to see that this one is gone.
 */
export class Haste {
  #left = MAX_HURRIED;
  #at = 0;

  /** `progress`: content has come since the last time. */
  take(progress: boolean): boolean {
    const now = performance.now();
    if (progress && now - this.#at > HURRY_RENEWED_MS) this.#left = MAX_HURRIED;
    this.#at = now;
    if (this.#left === 0) return false;
    this.#left--;
    return true;
  }
}

/** The wait before so many-th attempt after the first: twice as long each time, up to a limit, with jitter. */
export function retryMs(failures: number): number {
  return Math.min(LAST_RETRY_MS, FIRST_RETRY_MS * 2 ** (failures - 1)) * (0.75 + Math.random() / 2);
}
