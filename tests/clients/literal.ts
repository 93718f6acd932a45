// A value of exactly its own type, for messages that may have more members than their type says.
type Mutable<T> = { -readonly [K in keyof T]: Mutable<T[K]> };
export const literal = <const T>(value: T) => value as Mutable<T>;
