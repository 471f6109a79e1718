/**
 * Exchanges that a server has sent on while others of them were under way: each address that they lead to gets one
 * connection, over which all that is to be asked there is asked as it becomes known.
 *
 * The pipeline that they come from goes on meanwhile. What a holder that fails has not answered goes back to it, since
 * its server may know of another by now.
 */
import { sleep } from "./connection.ts";
import { type Address, nameOf, type Peer, Route, SentOn } from "./peer.ts";
import { Dropped, type Exchange, Haste, Pipeline, retryMs } from "./pipeline.ts";
import { ERRORS, RepriseError } from "./protocol.ts";
import { checkTries } from "./remote.ts";

interface HoldersOptions {
  retries: number;
  note: (text: string) => void;
}

export class Holders {
  readonly origin: Pipeline;
  readonly open: (address: Address) => Promise<Peer>;
  readonly options: HoldersOptions;
  readonly signal: AbortSignal;
  readonly #holders = new Map<string, Holder>();
  isClosed = false;

  /** `origin` is told what becomes of its exchanges. */
  constructor(
    origin: Pipeline,
    open: (address: Address) => Promise<Peer>,
    options: HoldersOptions,
    signal: AbortSignal,
  ) {
    this.origin = origin;
    this.open = open;
    this.options = options;
    this.signal = signal;
  }

  add(exchange: Exchange, sentOn: SentOn): void {
    this.move(new Away(this, exchange, new Route(sentOn.from, "failed")), sentOn);
  }

  /** To where it is sent on to; that may be a circle. */
  move(away: Away, sentOn: SentOn): void {
    if (this.isClosed) return;
    try {
      const address = away.route.next(sentOn.address);
      const name = nameOf(address);
      const holder = this.#holders.get(name) ?? new Holder(this, address);
      this.#holders.set(name, holder);
      holder.add(away);
    } catch (error) {
      if (!(error instanceof RepriseError)) throw error;
      away.failed(error);
    }
  }

  /** What is still under way there is given up. */
  async close(): Promise<void> {
    this.isClosed = true;
    await Promise.all([...this.#holders.values()].map((holder) => holder.close()));
  }
}

/** An exchange at a holder. */
class Away implements Exchange {
  readonly #holders: Holders;
  readonly exchange: Exchange;
  readonly route: Route;
  holder: Holder | undefined;
  #isSettled = false;

  constructor(holders: Holders, exchange: Exchange, route: Route) {
    this.#holders = holders;
    this.exchange = exchange;
    this.route = route;
  }

  open(): Promise<void> | undefined {
    return this.exchange.open?.();
  }

  ask(peer: Peer): Promise<void> | undefined {
    return this.exchange.ask(peer);
  }

  async take(peer: Peer): Promise<boolean> {
    try {
      if (await this.exchange.take(peer)) return true;
      this.settle();
    } catch (error) {
      if (!(error instanceof SentOn)) throw error;
      this.#leave();
      this.#holders.move(this, error);
    }
    return false;
  }

  failed(error: RepriseError): void {
    this.settle();
    this.exchange.failed(error);
  }

  /** It is done with, or to be asked again where it came from. */
  settle(again?: Exchange): void {
    this.#leave();
    if (!this.#isSettled) this.#holders.origin.settle(again);
    this.#isSettled = true;
  }

  #leave(): void {
    this.holder?.pending.delete(this);
    this.holder = undefined;
  }
}

/** One whom others send to. */
class Holder {
  readonly #holders: Holders;
  readonly #address: Address;
  /** Of these, what is not yet asked. */
  #queue: Away[] = [];
  readonly pending = new Set<Away>();
  #peer: Peer | undefined;
  #running: Promise<void> | undefined;
  readonly #haste = new Haste();
  #failures = 0;
  #waits = 0;

  constructor(holders: Holders, address: Address) {
    this.#holders = holders;
    this.#address = address;
  }

  add(away: Away): void {
    away.holder = this;
    this.pending.add(away);
    this.#queue.push(away);
    this.#running ??= this.#run();
  }

  async close(): Promise<void> {
    this.#peer?.close();
    await this.#running;
  }

  /** Until nothing is left to be asked; the connection then stays for what may still come. Never throws. */
  async #run(): Promise<void> {
    try {
      while (this.pending.size > 0 && !this.#holders.isClosed) await this.#attempt();
    } catch (error) {
      this.#holders.origin.stop(error);
    } finally {
      this.#running = undefined;
      if (this.#holders.isClosed) this.#drop();
    }
  }

  async #attempt(): Promise<void> {
    const { origin, open, options, signal } = this.#holders;
    const supply = () => this.#queue.shift();
    const pipeline = new Pipeline(supply, options.retries, signal, { beforeWait: origin.beforeWait });
    try {
      this.#peer ??= await open(this.#address);
      await pipeline.run(this.#peer);
    } catch (error) {
      const progress = this.#peer?.progress === true;
      this.#drop();
      if (this.#holders.isClosed) return;
      if (error instanceof Dropped) this.#queue = [...this.pending];
      else if (error instanceof RepriseError && ERRORS[error.code].retry) await this.#giveBack(error, progress);
      else throw error;
    }
  }

  /** After a failure: to the server that has sent them here, soon. */
  async #giveBack(error: RepriseError, progress: boolean): Promise<void> {
    const { options, signal } = this.#holders;
    if (progress) this.#failures = this.#waits = 0;
    this.#failures++;
    const isHurried = this.#haste.take(progress);
    try {
      checkTries(error, this.#failures, options.retries);
    } catch (final) {
      const { code, message } = final as RepriseError;
      // An error is said once: each has its own.
      for (const away of [...this.pending]) away.failed(new RepriseError(code, message, final));
      this.#queue = [];
      return;
    }
    options.note(`${error.message}; asking elsewhere (${this.#failures} of ${options.retries})`);
    if (!isHurried) await sleep(retryMs(++this.#waits), signal);
    this.#queue = [];
    for (const away of [...this.pending]) away.settle(away.exchange);
  }

  #drop(): void {
    this.#peer?.close();
    this.#peer = undefined;
  }
}
